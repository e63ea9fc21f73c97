"""Searches of models from 1B to 405B parameters on 1 to 16 workers, simulated: time, idle share, memory and money.

The real engine asks for trials and is told losses of a synthetic landscape; a trial takes the time that its cost says,
times a ratio that was recorded with real fine-tunes. Which trials there are follows from the cost model and the ladder
of fidelities, as in a real search. What is assumed of machines and of the fine-tune stands in
``benchmarks/scale/machines.py`` with its sources, and most of it is a flag here. Nothing is trained; takes minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks.scale.cases import COMPARED_WORKERS, REFERENCE, Case, World, run_case  # noqa: E402
from benchmarks.scale.machines import Gpu, Recipe  # noqa: E402
from benchmarks.scale.models import SHAPES  # noqa: E402
from benchmarks.scale.picture import plot  # noqa: E402
from benchmarks.scale.searches import recorded_ratios  # noqa: E402
from benchmarks.scale.tables import memory_row, size_row, stage_rows, table, workers_row  # noqa: E402
from benchmarks.search.overhead import measure_overhead  # noqa: E402
from peft_autoqra.search_config import SearchArguments  # noqa: E402
from peft_autoqra.terminal_bar import terminal_bar  # noqa: E402

OVERHEAD_LAYERS = (16, 80)  # of the problems that asking is timed on, 7 groups a layer
OVERHEAD_TRIALS = 60


def main() -> None:
    """Simulate, print tables, write JSON and a picture."""
    options = parse_options()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    gpu = Gpu(
        name=options.gpu_name,
        memory_bytes=options.gpu_memory_gb * 1e9,
        peak_flops=options.peak_tflops * 1e12,
        utilisation=options.utilisation,
        hour_price=options.gpu_hour_price,
    )
    search = SearchArguments(max_cost=options.max_cost)
    compared = [Case(size, num, 0) for size in options.sizes for num in COMPARED_WORKERS]
    seeds = range(options.num_seeds)
    nums = sorted({1, *options.num_workers})
    varied = [Case(REFERENCE, num, seed, scatters) for num in nums for seed in seeds for scatters in (True, False)]
    cases = list(dict.fromkeys([*compared, *varied]))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        overheads = tuple(pool.map(measure_overhead, OVERHEAD_LAYERS, [OVERHEAD_TRIALS] * len(OVERHEAD_LAYERS)))
        ratios = recorded_ratios(options.trials_dir)
        world = World(gpu, Recipe(num_tokens=options.num_tokens), search, overheads, ratios)
        searches = terminal_bar(pool.map(run_case, [world] * len(cases), cases), "simulating", len(cases))
        found = dict(zip(cases, searches, strict=True))
    tables = {
        "sizes": [size_row(world, case, found[case]) for case in compared],
        "memory": [memory_row(world, size) for size in options.sizes],
        "workers": [workers_row(num, seeds, found) for num in nums],
        "stages": stage_rows(found[Case(REFERENCE, 1, 0)], found[Case(REFERENCE, nums[-1], 0)]),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write(options.output_dir / "summary.json", world, tables)
    plot(options.output_dir / "scale.png", tables["sizes"], tables["workers"])
    print("\n\n".join(map(table, tables.values())))


def parse_options() -> argparse.Namespace:
    """Flags."""
    gpu, recipe = Gpu(), Recipe()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models")
    parser.add_argument("--num_workers", nargs="+", type=int, default=[1, 2, 4, 8, 16], help=f"for {REFERENCE}")
    parser.add_argument("--num_seeds", type=int, default=3, help=f"searches of {REFERENCE}, at least 2")
    parser.add_argument("--max_cost", type=float, default=1.0, help="of a search, in full fine-tunes")
    parser.add_argument("--num_tokens", type=float, default=recipe.num_tokens, help="of the full fine-tune")
    parser.add_argument("--gpu_name", default=gpu.name, help="for the record")
    parser.add_argument("--gpu_memory_gb", type=float, default=gpu.memory_bytes / 1e9, help="of one GPU")
    parser.add_argument("--peak_tflops", type=float, default=gpu.peak_flops / 1e12, help="dense bfloat16")
    parser.add_argument("--utilisation", type=float, default=gpu.utilisation, help="share of the peak that is reached")
    parser.add_argument("--gpu_hour_price", type=float, default=gpu.hour_price, help="dollars")
    parser.add_argument("--processes", type=int, default=2, help="that simulate side by side")
    parser.add_argument("--trials_dir", type=Path, default=ROOT / "benchmarks/trials", help="recorded fine-tunes")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks/results/scale", help="of the results")
    return parser.parse_args()


def write(path: Path, world: World, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Results with all that they follow from."""
    content = {
        "device": platform.machine(),
        "gpu": asdict(world.gpu),
        "recipe": asdict(world.recipe),
        "max_cost": world.search.max_cost,
        "overheads": [asdict(overhead) for overhead in world.overheads],
        "recorded_ratios": {"num": len(world.ratios), "least": min(world.ratios), "most": max(world.ratios)},
        **tables,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
