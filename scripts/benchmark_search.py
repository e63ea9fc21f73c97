"""The search beside its rivals at equal evaluation cost: simple regret on landscapes with a known optimum.

Synthetic landscapes are drawn anew for every seed; the recorded fine-tunes of ``benchmarks/trials`` are replayed. Runs
that are in the record are not made again, so a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

import matplotlib as mpl  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.search.comparison import (  # noqa: E402
    Job,
    RegretCurve,
    append_curve,
    read_curves,
    run_jobs,
    write_curves,
)
from benchmarks.search.curves import (  # noqa: E402
    difference_table,
    median_interval,
    names,
    paired_difference,
    plot_regrets,
    regret_table,
    select,
)
from benchmarks.search.landscapes import LANDSCAPES  # noqa: E402
from benchmarks.search.methods.registry import ABLATIONS, METHODS  # noqa: E402
from benchmarks.search.replay import load_replays  # noqa: E402

PACKAGES = ("peft-autoqra", "numpy", "scipy", "torch", "botorch", "deap", "optuna")


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
        landscapes: what is searched; None for the recorded budgets.
        methods: what is compared.
        budget: cost of a run, in evaluations at the highest level.
        folder: of the results.
    """

    landscapes: tuple[str, ...] | None
    methods: tuple[str, ...]
    budget: float
    folder: str


PARTS = {
    "synthetic": Part(tuple(LANDSCAPES), tuple(METHODS), 30.0, "search"),
    "ablations": Part(("interactions", "multi-fidelity"), ("autoqra", *ABLATIONS), 30.0, "search-ablations"),
    "recorded": Part(None, tuple(METHODS), 5.0, "search-recorded-5"),
    "recorded-longer": Part(None, tuple(METHODS), 10.0, "search-recorded-10"),
}


def main() -> None:
    """Run what is not recorded, print, write JSON and a picture."""
    options = parse_options()
    mpl.use("Agg")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    for name in options.parts:
        print(f"\n# {name}")
        compare(PARTS[name], options)


def compare(part: Part, options: argparse.Namespace) -> None:
    """One part: runs, tables, files."""
    landscapes = options.landscapes or part.landscapes or tuple(load_replays(options.trials_dir))
    budget = options.budget or (8.0 if options.quick else part.budget)
    wanted = [
        Job(landscape, method, seed, budget)
        for seed in range(2 if options.quick else options.seeds)
        for landscape in landscapes
        for method in options.methods or part.methods
    ]
    folder = options.output_dir / part.folder
    record = folder / "runs.jsonl"
    known = {} if options.quick else read_curves(record)
    missing = [job for job in wanted if options.fresh or job not in known]
    start = time.perf_counter()
    for number, curve in enumerate(run_jobs(missing, options.trials_dir, options.jobs), 1):
        known[curve.job] = curve
        if not options.quick:
            append_curve(record, curve)
        print_progress(curve, number, len(missing), time.perf_counter() - start)
    curves = [known[job] for job in wanted]
    print_tables(curves, options.ours)
    if not options.quick:
        write_curves(record, list(known.values()))
        write_summary(folder / "summary.json", curves, options)
        plot_regrets(curves, folder / "regret.png", options.ours)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--landscapes", nargs="+", help="in place of the part's")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATIONS], help="in place of the part's")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--budget", type=float, help="cost of a run, evaluations at the highest level")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--ours", default="autoqra", help="the method that the others are compared with")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--trials_dir", type=Path, default=ROOT / "benchmarks" / "trials")
    parser.add_argument("--fresh", action="store_true", help="run again what is recorded")
    parser.add_argument("--quick", action="store_true", help="two seeds, a cost of 8, nothing written")
    options = parser.parse_args()
    recorded = list(load_replays(options.trials_dir)) if options.trials_dir.exists() else []
    available = [*LANDSCAPES, *recorded]
    if unknown := set(options.landscapes or ()) - set(available):
        parser.error(f"--landscapes: {', '.join(sorted(unknown))} not among {', '.join(available)}")
    return options


def print_progress(curve: RegretCurve, number: int, total: int, seconds: float) -> None:
    """One line per run."""
    job = curve.job
    end = f"{curve.steps[-1][1]:.4f}" if curve.steps else "nothing evaluated"
    print(f"{number}/{total} {seconds:.0f} s: {job.landscape} {job.method} seed {job.seed}: {end}", flush=True)


def print_tables(curves: list[RegretCurve], ours: str) -> None:
    """Markdown."""
    print(f"\nSimple regret, nats per token: median over seeds, 95% bootstrap interval\n\n{regret_table(curves)}")
    if any(curve.job.method == ours for curve in curves):
        print(f"\nPaired differences over seeds; below zero {ours} is better\n\n{difference_table(curves, ours)}")


def write_summary(path: Path, curves: list[RegretCurve], options: argparse.Namespace) -> None:
    """Figures of the tables, with what they were made on."""
    rows = []
    for landscape in names(curves)[0]:
        for method in names(curves)[1]:
            runs = select(curves, landscape, method)
            ends = [curve.at(np.array([curve.job.budget]))[0] for curve in runs]
            difference = paired_difference(select(curves, landscape, options.ours), runs)
            rows.append(
                {
                    "landscape": landscape,
                    "method": method,
                    "regret": asdict(median_interval(np.array(ends))),
                    "ours_minus_it": asdict(difference) if difference and method != options.ours else None,
                    "median_seconds": float(np.median([curve.seconds for curve in runs])),
                }
            )
    content = {
        "device": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "settings": {"seeds": options.seeds, "budget": curves[0].job.budget, "ours": options.ours},
        "results": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
