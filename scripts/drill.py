"""The reliability drill: kills, full disks, damaged files, trouble in trials and races; exit status 1 if one was lost.

Everything is real: processes of the commands, SIGKILL, a file system that is full, bytes on disk. Only the model is
tiny. It needs a POSIX system; as root on Linux the full disk is a small file system, elsewhere files are limited in
size.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks.drill.corruption import drill_corruption  # noqa: E402
from benchmarks.drill.disk_full import drill_full_disks  # noqa: E402
from benchmarks.drill.jobs import SearchJob, TrainJob, make_inputs  # noqa: E402
from benchmarks.drill.kills import KillDrill  # noqa: E402
from benchmarks.drill.outcome import Attempt, PartOutcome  # noqa: E402
from benchmarks.drill.processes import Processes  # noqa: E402
from benchmarks.drill.races import drill_races  # noqa: E402
from benchmarks.drill.trouble import drill_trouble  # noqa: E402
from tests.tiny_folder import TinyFolder  # noqa: E402

PACKAGES = ("peft-autoqra", "torch", "transformers", "peft", "trl", "safetensors")
Drill = Callable[[Processes, tuple[str, ...], Path, argparse.Namespace], tuple[list[Attempt], Mapping[str, Any]]]


def main() -> int:
    """Run the parts, print and write what was survived."""
    args = _parse()
    with tempfile.TemporaryDirectory(prefix="drill-") as name:
        directory = Path(name)
        processes = Processes(directory)
        ended = processes.call(make_inputs, directory / "inputs").ended()
        if ended.code:
            raise RuntimeError(ended.output)
        folder = TinyFolder(directory / "inputs" / "model", directory / "inputs" / "data")
        parts = [_run(part, processes, tuple(folder.flags), directory, args) for part in args.parts]
    num, num_survived = sum(len(part.attempts) for part in parts), sum(part.num_survived for part in parts)
    print(f"{num_survived} of {num} survived with nothing lost.")
    return 0 if num_survived == num else 1


def _run(
    name: str, processes: Processes, flags: tuple[str, ...], directory: Path, args: argparse.Namespace
) -> PartOutcome:
    start = time.perf_counter()
    folder = directory / name
    folder.mkdir()
    attempts, figures = PARTS[name](processes, flags, folder, args)
    outcome = PartOutcome(name=name, attempts=attempts, seconds=time.perf_counter() - start, figures=dict(figures))
    print(outcome, flush=True)
    _write(args, outcome)
    return outcome


def _kills(
    processes: Processes, flags: tuple[str, ...], directory: Path, args: argparse.Namespace
) -> tuple[list[Attempt], Mapping[str, Any]]:
    """That many of a search and that many of a fine-tune."""
    attempts: list[Attempt] = []
    figures: dict[str, Any] = {}
    for kind in (SearchJob, TrainJob):
        drill = KillDrill(processes, kind(flags, directory / kind.name), (processes.caches,))
        attempts += drill.run(args.num_kills, random.Random(f"{args.seed} {kind.name}"))
        figures |= drill.figures()
    return attempts, figures


PARTS: Mapping[str, Drill] = {
    "kills": _kills,
    "disk": lambda p, f, d, args: drill_full_disks(p, f, d, args.num_disks, str(args.seed)),
    "corruption": lambda p, f, d, args: drill_corruption(p, f, d, args.num_damages, str(args.seed)),
    "trouble": lambda p, f, d, args: drill_trouble(p, f, d, args.num_troubles, str(args.seed)),
    "races": lambda p, f, d, args: drill_races(p, f, d, args.num_races, str(args.seed)),
}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to run (all)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (0)")
    parser.add_argument("--num_kills", type=int, default=50, help="of a search, and of a fine-tune (50)")
    parser.add_argument("--num_disks", type=int, default=10, help="sizes of each of four cases (10)")
    parser.add_argument("--num_damages", type=int, default=200, help="of each kind of file (200)")
    parser.add_argument("--num_troubles", type=int, default=10, help="searches, and fine-tunes (10)")
    parser.add_argument("--num_races", type=int, default=10, help="of two to four searches (10)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results", help="for drill.json")
    return parser.parse_args()


def _write(args: argparse.Namespace, part: PartOutcome) -> None:
    """Into ``drill.json``, in the place of an earlier run of this part; the others are left there."""
    path = args.output_dir / "drill.json"
    parts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts[part.name] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "seed": args.seed,
        **part.to_dict(args.seed),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
