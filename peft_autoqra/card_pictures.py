"""The pictures that a model card shows, made of what a plan knows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_autoqra.drawing import plot_settings
from peft_autoqra.front_figure import front_figure
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_figure import memory_figure
from peft_autoqra.objective_info import ObjectiveInfo, objective_from
from peft_autoqra.plan_grid import BitsAndRank
from peft_autoqra.plan_picture import PICTURE_FILE, draw_plan
from peft_autoqra.plan_points import PlanPoint, budget_from, points_from

FRONT_FILE, MEMORY_FILE = "autoqra_front.png", "autoqra_memory.png"
PICTURE_FILES = (PICTURE_FILE, FRONT_FILE, MEMORY_FILE)


def write_card_pictures(
    directory: Path,
    layers: Mapping[str, BitsAndRank],
    memory: MemoryEstimate | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> frozenset[str]:
    """Write the pictures of a plan; files that hold them already are left alone.

    Pictures that were drawn before are remembered, since trainers save the same plan with every checkpoint.

    Args:
        directory: of the model card.
        layers: module name to bits and rank.
        memory: bytes by part, where known.
        provenance: how the plan was found.

    Returns:
        Names of the files that are there now. None can be drawn where matplotlib is broken or a file cannot be
        written; that is a warning, since saving a model must not fail because of it.
    """
    known = provenance or {}
    budget, points, objective = budget_from(known), points_from(known), objective_from(known)
    drawn: dict[str, Callable[[], bytes | None]] = {PICTURE_FILE: lambda: draw_plan(layers)}
    if points:
        drawn[FRONT_FILE] = lambda: _draw_front(points, budget, objective)
    if memory is not None and memory.total_bytes > 0:
        drawn[MEMORY_FILE] = lambda: _draw_memory(memory, budget)
    return frozenset(name for name, draw in drawn.items() if _write(directory / name, draw))


def _write(path: Path, draw: Callable[[], bytes | None]) -> bool:
    try:
        png = draw()
        if png is not None and not (path.is_file() and path.read_bytes() == png):
            _write_whole(path, png)
    except (ImportError, OSError) as error:
        warnings.warn(f"The picture of the plan, {path}, cannot be written: {error}.", stacklevel=4)
        return False
    return png is not None


def _write_whole(path: Path, content: bytes) -> None:
    """Beside its place, then there: the hub's cache holds links, and what they lead to is shared."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@lru_cache(maxsize=4)
def _draw_front(points: tuple[PlanPoint, ...], budget: tuple[int, str] | None, objective: ObjectiveInfo) -> bytes:
    with plot_settings():
        return front_figure(points, budget, objective).to_png()


@lru_cache(maxsize=4)
def _draw_memory(memory: MemoryEstimate, budget: tuple[int, str] | None) -> bytes:
    with plot_settings():
        return memory_figure({"plan": memory}, budget).to_png()
