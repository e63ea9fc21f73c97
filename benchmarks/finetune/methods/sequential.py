"""One rank everywhere, then bits by sensitivity, each without regard to the other (LQ-LoRA, arXiv 2311.12023)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.finetune.method import NotApplicable, Spent
from benchmarks.finetune.search_of import Calibrated, searcher_of
from benchmarks.finetune.setting import Setting
from peft_autoqra.importance.allocation import allocate
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

RANK = 16
LEAST_BITS = 3


@dataclass(frozen=True)
class Sequential:
    """The rank is fixed first, then bits are allocated exactly by what is lost without an adapter.

    Quantizer, calibration and compensated start are those of the search, so that the allocation alone differs.
    """

    name: str = "sequential"

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Write the plan.

        Raises:
            NotApplicable: not even the fewest bits and smallest rank are within the budget.
        """
        calibrated = Calibrated.of(searcher_of(setting, budget, folder))
        start = time.perf_counter()
        problem = calibrated.problem
        candidate = allocate(bits_problem(problem, common_rank(problem)))
        calibrated.save(problem.space.decode(candidate), folder, self.name)
        seconds = calibrated.seconds + time.perf_counter() - start
        return Spent(seconds=seconds, cost=calibrated.setup.costs.calibration)


def common_rank(problem: SearchProblem) -> int:
    """16, or the largest rank below it with which every module could still have 3 bits.

    Where none leaves that much, the smallest there is.

    Raises:
        NotApplicable: not even that is within the budget.
    """
    space = problem.space
    ranks = [rank for rank in reversed(space.rank_choices) if 0 < rank <= RANK]
    for rank in ranks:
        if problem.is_feasible(space.uniform(LEAST_BITS, rank)):
            return rank
    if ranks and problem.is_feasible(space.uniform(space.bit_choices[0], ranks[-1])):
        return ranks[-1]
    raise NotApplicable(f"{problem.budget_bytes:,} bytes leave no room for an adapter of one rank everywhere.")


def bits_problem(problem: SearchProblem, rank: int) -> SearchProblem:
    """The problem with one rank, all others being too large to take, and with the losses without an adapter."""
    groups, choice = np.arange(problem.space.num_groups), _ranks_of(problem.space.uniform(LEAST_BITS, rank))
    sizes = np.full_like(problem.bytes_table, problem.budget_bytes + 1)
    sizes[groups, :, choice] = problem.bytes_table[groups, :, choice]
    losses = np.repeat(problem.loss_table[:, :, :1], problem.loss_table.shape[2], axis=2)
    return replace(problem, bytes_table=sizes, loss_table=losses)


def _ranks_of(candidate: Candidate) -> list[int]:
    return [rank for _, rank in candidate]
