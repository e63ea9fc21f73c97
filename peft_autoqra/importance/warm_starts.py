"""Candidates that need no search: exact allocations and uniform ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from peft_autoqra.errors import MemoryBudgetError
from peft_autoqra.importance.allocation import allocate, pareto_allocations
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

PARETO_FRACTIONS = (0.98, 0.95, 0.9, 0.8)  # of the budget


def best_allocation(problem: SearchProblem) -> Candidate:
    """The exact allocation; where it has no adapter at all, the best one that can be trained."""
    allocation = allocate(problem)
    if problem.is_trainable(allocation):
        return allocation
    floored = (candidate for candidate in floored_allocations(problem) if problem.is_trainable(candidate))
    return next(floored, problem.smallest_trainable_candidate())


def floored_allocations(problem: SearchProblem) -> Iterator[Candidate]:
    """Exact allocations without ranks below a floor, for every floor within reach.

    The additive estimate need not know what a rank is worth to the task; these say so in steps.
    """
    space = problem.space
    for floor in range(1, len(space.rank_choices)):
        sizes = problem.bytes_table.copy()
        for group in range(space.num_groups):
            sizes[group, :, : min(floor, space.num_ranks(group) - 1)] = problem.budget_bytes + 1
        try:
            yield allocate(replace(problem, bytes_table=sizes))
        except MemoryBudgetError:
            return


def best_uniform(problem: SearchProblem) -> Candidate | None:
    """Of the largest feasible uniform rank at every bit-width, the one with the least predicted loss.

    None where no uniform candidate with an adapter is within the budget.
    """
    space = problem.space
    largest = []
    for bits in space.bit_choices:
        feasible = [c for rank in space.rank_choices if problem.is_feasible(c := space.uniform(bits, rank))]
        largest += [candidate for candidate in feasible[-1:] if problem.is_trainable(candidate)]
    return min(largest, key=problem.predicted_loss, default=None)


def smaller_allocations(problem: SearchProblem) -> list[Candidate]:
    """Exact allocations of budgets below the problem's own: the Pareto curve of the estimate near its end."""
    slack = problem.budget_bytes - problem.smallest_bytes
    budgets = np.unique([problem.smallest_bytes + int(fraction * slack) for fraction in PARETO_FRACTIONS])
    return pareto_allocations(problem, budgets[::-1].tolist())
