"""Which searches are simulated, and in which world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.scale.machines import Gpu, Recipe
from benchmarks.scale.models import model_size
from benchmarks.scale.searches import SimulatedSearch, simulate_search
from benchmarks.search.overhead import Overhead
from peft_autoqra.search_config import SearchArguments

REFERENCE = "8B"
"""On which the number of workers is varied."""

COMPARED_WORKERS = (1, 8)
"""For every size."""


@dataclass(frozen=True)
class Case:
    """One simulated search.

    Attributes:
        size: of the model.
        num_workers: that evaluate.
        seed: of landscape, engine and durations.
        scatters: durations differ as recorded ones do; otherwise a trial takes what its cost says.
    """

    size: str
    num_workers: int
    seed: int
    scatters: bool = True


@dataclass(frozen=True)
class World:
    """What all cases share.

    Attributes:
        gpu: of the workers.
        recipe: of the fine-tune.
        search: settings.
        overheads: timed searches without evaluations.
        ratios: of recorded durations.
    """

    gpu: Gpu
    recipe: Recipe
    search: SearchArguments
    overheads: tuple[Overhead, ...]
    ratios: tuple[float, ...]

    def asking_seconds(self, num_groups: int) -> float:
        """Per trial, on a straight line through what was timed."""
        groups = [overhead.num_groups for overhead in self.overheads]
        seconds = [overhead.total_seconds / overhead.num_trials for overhead in self.overheads]
        slope, offset = np.polyfit(groups, seconds, 1)
        return max(float(offset + slope * num_groups), 0.0)


def run_case(world: World, case: Case) -> SimulatedSearch:
    """Simulate one search."""
    size = model_size(case.size)
    return simulate_search(
        world.recipe.costs(size, world.search),
        world.search,
        case.num_workers,
        full_seconds=world.recipe.full_seconds(size, world.gpu),
        asking_seconds=world.asking_seconds(len(size.linears)),
        ratios=world.ratios if case.scatters else (1.0,),
        seed=case.seed,
    )
