"""Pack a search of the demo for the tests and the docs: its log, its result and its plan.

python scripts/demo.py --max_cost 3
python scripts/record_demo.py demo-out/search-75
python -m pytest tests/test_report_in_browser.py --write-screenshots
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from peft_autoqra import BitRankPlan

RECORDED = Path(__file__).parents[1] / "docs" / "demo-search.zip"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same archive of the same files


def main() -> None:
    """Write the archive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="output directory of one search of the demo")
    directory = parser.parse_args().directory
    plan = BitRankPlan.from_pretrained(directory / "plan")
    with tempfile.TemporaryDirectory() as folder:
        # the folder of the model on this machine says nothing elsewhere; the calibration is megabytes
        base_model = replace(plan.base_model, name_or_path=BASE_MODEL)
        plan.replace(base_model=base_model, calibration=None).save_pretrained(folder)
        files = {
            "trials.jsonl": directory / "trials.jsonl",
            "search_result.json": directory / "search_result.json",
            "plan/autoqra_plan.safetensors": Path(folder) / "autoqra_plan.safetensors",
        }
        with zipfile.ZipFile(RECORDED, "w") as archive:
            for name, path in files.items():
                archive.writestr(zipfile.ZipInfo(name, LONG_AGO), path.read_bytes(), zipfile.ZIP_LZMA)
    print(f"{RECORDED}: {RECORDED.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
