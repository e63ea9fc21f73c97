"""Greedy walks along the ladders: down until a candidate keeps the budget, up until the budget is used."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

EPSILON = 1e-3  # of Eq. 5: a step without any importance still costs something, so the larger saving wins
STEP_NOISE = 0.5  # standard deviation of the log-normal factor on the price of a step when a generator is given


def repair(
    problem: SearchProblem,
    candidate: Candidate,
    importance: ImportancePriors,
    rng: np.random.Generator | None = None,
) -> Candidate:
    """Step down until the budget is kept (AutoQRA, Eq. 4-5).

    While over budget, the one step (bits or rank of one group) with the least ``(I + eps) / bytes saved`` is taken.
    Where no step saves bytes, which takes tables that do not grow along the ladders, the smallest candidate is given.

    Args:
        problem: tables and budget.
        candidate: on the ladders; over budget or not.
        importance: prices of the steps.
        rng: multiplies the prices by log-normal noise, so that one candidate has many repairs; None for none.
    """
    excess = problem.total_bytes(candidate) - problem.budget_bytes
    if excess <= 0:
        return candidate
    walk = _Walk(problem, candidate, importance, rng, direction=-1)
    while excess > 0 and (saved := walk.take_best_step()):
        excess -= saved
    return walk.candidate() if excess <= 0 else problem.smallest_candidate()


def fill(
    problem: SearchProblem,
    candidate: Candidate,
    importance: ImportancePriors,
    rng: np.random.Generator | None = None,
) -> Candidate:
    """Step up while the budget allows it, always by the step with the most importance per byte.

    Args:
        problem: tables and budget.
        candidate: feasible.
        importance: gains of the steps; steps without importance are not taken.
        rng: as in :func:`repair`.
    """
    slack = problem.budget_bytes - problem.total_bytes(candidate)
    walk = _Walk(problem, candidate, importance, rng, direction=1)
    while slack > 0 and (spent := walk.take_best_step(limit=slack)):
        slack -= spent
    return walk.candidate()


class _Walk:
    """A candidate in motion, with a queue of all steps of one direction, the most worthwhile first.

    A queued step is stale once its group has moved; it is told by the position that it started from.
    """

    def __init__(
        self,
        problem: SearchProblem,
        candidate: Candidate,
        importance: ImportancePriors,
        rng: np.random.Generator | None,
        direction: int,
    ) -> None:
        """Queue the steps of every group."""
        self.problem, self.steps, self.direction = problem, importance.steps, direction
        self.positions = problem.space.as_array(candidate)
        self.num_rungs = problem.space.num_rungs
        shape = self.positions.shape
        self.factors = np.exp(rng.normal(0.0, STEP_NOISE, shape)) if rng is not None else np.ones(shape)
        groups = np.arange(len(self.positions))
        self.queue = self._steps_of(groups, 0) + self._steps_of(groups, 1)
        heapq.heapify(self.queue)

    def candidate(self) -> Candidate:
        """Where the walk has come to."""
        return self.problem.space.from_array(self.positions)

    def take_best_step(self, limit: int | None = None) -> int:
        """Take the best step that changes at most ``limit`` bytes; returns how many, 0 where there is none."""
        while self.queue:
            _, group, axis, bit, rank, change = heapq.heappop(self.queue)
            stale = (bit, rank) != (self.positions[group, 0], self.positions[group, 1])
            if stale or (limit is not None and change > limit):
                continue
            self.positions[group, axis] += self.direction
            for entry in self._steps_of(np.array([group]), 0) + self._steps_of(np.array([group]), 1):
                heapq.heappush(self.queue, entry)
            return change
        return 0

    def _steps_of(self, groups: npt.NDArray[np.int64], axis: int) -> list[tuple[float, int, int, int, int, int]]:
        """Entries (key, group, axis, bit, rank, bytes changed) of the possible steps of some groups."""
        target = self.positions[groups, axis] + self.direction
        groups = groups[(target >= 0) & (target < self.num_rungs[groups, axis])]
        start = self.positions[groups]
        end = start.copy()
        end[:, axis] += self.direction
        sizes = self.problem.bytes_table
        change = self.direction * (sizes[groups, end[:, 0], end[:, 1]] - sizes[groups, start[:, 0], start[:, 1]])
        upper = end if self.direction > 0 else start
        importance = self.steps[groups, upper[:, 0], upper[:, 1], axis]
        price = (importance + EPSILON) * self.factors[groups, axis] / np.maximum(change, 1)
        useful = (change > 0) & ((importance > 0) | (self.direction < 0))
        rows = np.column_stack([groups, np.full_like(groups, axis), start, change])[useful].tolist()
        return [(-self.direction * p, *row) for p, row in zip(price[useful].tolist(), rows, strict=True)]
