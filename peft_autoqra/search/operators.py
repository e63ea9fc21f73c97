"""Variation of candidates: mutations and crossover that end within the budget. Pure functions of their generator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import repair
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

GAMMA = 1.5  # AutoQRA: variables to mutate are drawn with probability proportional to importance ** gamma
IMPORTANCE_FLOOR = 0.02  # so that variables without importance are reached too


def guided_mutation(
    problem: SearchProblem,
    importance: ImportancePriors,
    candidate: Candidate,
    rng: np.random.Generator,
    gamma: float = GAMMA,
) -> Candidate:
    """Move some variables (1 + Poisson(1)) one rung up or down, important ones more often; repaired to the budget.

    A space without any choice gives the candidate back.
    """
    positions = problem.space.as_array(candidate)
    tops = problem.space.num_rungs - 1
    if not tops.any():
        return candidate
    for _ in range(1 + int(rng.poisson(1.0))):
        group, axis = _draw_variable(importance, tops > 0, rng, gamma)
        up = positions[group, axis] == 0 or (positions[group, axis] < tops[group, axis] and rng.random() < 0.5)
        positions[group, axis] += 1 if up else -1
    return repair(problem, problem.space.from_array(positions), importance, rng)


def coupled_mutation(
    problem: SearchProblem,
    importance: ImportancePriors,
    candidate: Candidate,
    rng: np.random.Generator,
    gamma: float = GAMMA,
) -> Candidate:
    """Raise one variable by a rung and let the others pay for it (AutoQRA, Sec. 3.2).

    The raised variable is the last that the repair touches. A candidate at the top of every ladder comes back as is.
    """
    positions = problem.space.as_array(candidate)
    raisable = positions + 1 < problem.space.num_rungs
    if not raisable.any():
        return candidate
    group, axis = _draw_variable(importance, raisable, rng, gamma)
    positions[group, axis] += 1
    steps = importance.steps.copy()
    steps[group, ..., axis] = np.inf
    return repair(problem, problem.space.from_array(positions), replace(importance, steps=steps), rng)


def swap_mutation(
    problem: SearchProblem,
    importance: ImportancePriors,
    candidate: Candidate,
    rng: np.random.Generator,
) -> Candidate:
    """Two groups with different choices exchange them, ranks cut to what each allows; repaired to the budget."""
    positions = problem.space.as_array(candidate)
    first = int(rng.integers(len(positions)))
    different = np.flatnonzero((positions != positions[first]).any(axis=1))
    if not len(different):
        return candidate
    second = int(rng.choice(different))
    positions[[first, second]] = positions[[second, first]]
    positions[:, 1] = np.minimum(positions[:, 1], problem.space.rank_counts - 1)
    return repair(problem, problem.space.from_array(positions), importance, rng)


def block_crossover(
    problem: SearchProblem,
    importance: ImportancePriors,
    parents: tuple[Candidate, Candidate],
    rng: np.random.Generator,
) -> Candidate:
    """The first parent with one contiguous block of groups from the second; repaired to the budget.

    Neighbouring groups interact most, so they are inherited together.
    """
    first, second = parents
    start, stop = sorted(rng.integers(0, len(first) + 1, size=2).tolist())
    return repair(problem, (*first[:start], *second[start:stop], *first[stop:]), importance, rng)


def _draw_variable(
    importance: ImportancePriors, allowed: npt.NDArray[np.bool_], rng: np.random.Generator, gamma: float
) -> tuple[int, int]:
    """Group and ladder (0 bits, 1 rank), with probability proportional to importance ** gamma where allowed."""
    weights = np.column_stack([importance.bits, importance.rank]) + IMPORTANCE_FLOOR
    weights = np.where(allowed, weights**gamma, 0.0).ravel()
    index = int(rng.choice(weights.size, p=weights / weights.sum()))
    return index // 2, index % 2
