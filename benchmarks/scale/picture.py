"""Simulated searches as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.scale.cases import COMPARED_WORKERS, REFERENCE


def plot(path: Path, sizes: Sequence[dict[str, Any]], workers: Sequence[dict[str, Any]]) -> None:
    """Speed-up and idle share over workers; time over sizes."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    nums = [row["workers"] for row in workers]
    left.plot(nums, nums, color="0.7", linestyle="--", label="ideal")
    left.plot(nums, [row["speed_up"] for row in workers], marker="o", label="speed-up")
    left.plot(nums, [row["even_speed_up"] for row in workers], marker="o", label="speed-up, no stragglers", color="C2")
    left.set(xscale="log", yscale="log", xlabel="workers", ylabel="speed-up", title=f"{REFERENCE}, median of seeds")
    left.set_xticks(nums, [str(num) for num in nums])
    left.set_yticks(nums, [str(num) for num in nums])
    idle = left.twinx()
    idle.plot(nums, [row["idle_share"] for row in workers], color="C1", marker="s", label="idle share of workers")
    idle.set(ylim=(0, 1), ylabel="idle share")
    lines = [*left.get_lines(), *idle.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], loc="upper left", frameon=False)
    names = list(dict.fromkeys(row["model"] for row in sizes))
    for num in COMPARED_WORKERS:
        rows = [row for row in sizes if row["workers"] == num]
        label = f"{num} worker" + ("s" if num > 1 else "")
        right.plot(names, [row["search_seconds"] / 3600 for row in rows], marker="o", label=label)
    unsupported = [name for name in names if any(row["model"] == name and row["gpus_per_worker"] > 1 for row in sizes)]
    if unsupported:
        right.axvspan(names.index(unsupported[0]) - 0.5, len(names) - 0.5, color="0.92", label="does not fit one GPU")
    right.set(yscale="log", ylabel="hours", title="time of a search", xlabel="parameters")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)
