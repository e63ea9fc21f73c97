"""Simulated searches as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.scale.cases import REFERENCE, Case, World
from benchmarks.scale.machines import worker_memory
from benchmarks.scale.models import model_size
from benchmarks.scale.searches import SimulatedSearch
from peft_autoqra.markdown import markdown_table
from peft_autoqra.units import format_bytes, format_seconds


def size_row(world: World, case: Case, search: SimulatedSearch) -> dict[str, Any]:
    """Time and money of a model's search; of a worker of several GPUs, each with some layers, one works at a time."""
    size = model_size(case.size)
    num_gpus = worker_memory(size, world.recipe, world.search).num_gpus(world.gpu)
    return {
        "model": case.size,
        "workers": case.num_workers,
        "gpus_per_worker": num_gpus,
        "full_seconds": world.recipe.full_seconds(size, world.gpu),
        "search_seconds": search.seconds,
        "calibration_seconds": search.calibration_seconds,
        "asking_seconds": search.asking_seconds,
        "idle_share": search.idle_share,
        "dollars": case.num_workers * num_gpus * search.seconds / 3600 * world.gpu.hour_price,
    }


def memory_row(world: World, name: str) -> dict[str, Any]:
    """Memory of one worker."""
    memory = worker_memory(model_size(name), world.recipe, world.search)
    return {
        "model": name,
        "fits_one_gpu": memory.num_gpus(world.gpu) == 1,
        "device_bytes": memory.device_bytes,
        "model_bytes": memory.model_bytes,
        "copy_bytes": memory.copy_bytes,
        "training_bytes": memory.training_bytes,
        "materializes": memory.materializes(world.gpu),
        "materialized_bytes": memory.materialized_bytes,
        "bank_file_bytes": memory.bank_bytes,
        "statistics_file_bytes": memory.statistics_bytes,
    }


def workers_row(num_workers: int, seeds: Sequence[int], found: Mapping[Case, SimulatedSearch]) -> dict[str, Any]:
    """Medians over seeds; what differs from one worker is taken seed by seed."""
    many, one, even_many, even_one = (
        [found[Case(REFERENCE, num, seed, scatters)] for seed in seeds]
        for scatters in (True, False)
        for num in (num_workers, 1)
    )
    regrets = [search.regret for search in (*many, *even_many)]
    changes = [m.regret - o.regret for m, o in zip((*many, *even_many), (*one, *even_one), strict=True)]
    return {
        "workers": num_workers,
        "search_seconds": float(np.median([search.seconds for search in many])),
        "speed_up": _median_ratio(one, many),
        "even_speed_up": _median_ratio(even_one, even_many),
        "idle_share": float(np.median([search.idle_share for search in many])),
        "even_idle_share": float(np.median([search.idle_share for search in even_many])),
        "regret": float(np.median(regrets)),
        "regret_change": float(np.mean(changes)),
        "regret_change_standard_error": float(np.std(changes, ddof=1) / len(changes) ** 0.5),
    }


def _median_ratio(first: Sequence[SimulatedSearch], second: Sequence[SimulatedSearch]) -> float:
    return float(np.median([a.seconds / b.seconds for a, b in zip(first, second, strict=True)]))


def stage_rows(one: SimulatedSearch, many: SimulatedSearch) -> list[dict[str, Any]]:
    """Where the time goes, with one worker and with many."""
    rows: list[dict[str, Any]] = [
        {
            "stage": "calibration",
            "trials": None,
            "share_of_1": one.calibration_seconds / one.seconds,
            "share_of_many": many.calibration_seconds / many.seconds,
            "mean_running": 1.0,
            "most_running": 1,
        }
    ]
    alone = {time.stage: time for time in one.stages}
    for time in many.stages:
        rows.append(
            {
                "stage": time.stage,
                "trials": time.num_trials,
                "share_of_1": alone[time.stage].seconds / one.seconds,
                "share_of_many": time.seconds / many.seconds,
                "mean_running": time.mean_running,
                "most_running": time.most_running,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    return markdown_table(list(rows[0]), [[_cell(name, value) for name, value in row.items()] for row in rows])


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_seconds"):
        return format_seconds(value)
    if "share" in name:
        return f"{value:.0%}"
    return str(value) if isinstance(value, int) else f"{value:,.0f}" if name == "dollars" else f"{value:.2f}"
