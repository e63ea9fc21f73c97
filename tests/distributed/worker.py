"""One of several processes: runs ``autoqra train`` again and again, as the file it is given says.

Started by torchrun: ``worker.py SCENARIOS.json``, a list of {"name", "argv", "variables", "shards"}.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from peft_autoqra.cli import main
from tests.distributed.sharding_on_cpus import forget_accelerate_state, sharding_on_cpus


def run(scenario: dict, directory: Path) -> None:
    forget_accelerate_state()
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, scenario["variables"]),
        sharding_on_cpus() if scenario["shards"] else nullcontext(),
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(record=True) as caught,
    ):
        code = main(["train", *scenario["argv"]])
    outcome = {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "warnings": [str(warning.message) for warning in caught],
    }
    (directory / f"{scenario['name']}-{os.environ['RANK']}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for each in json.loads(path.read_text()):
        run(each, path.parent)
