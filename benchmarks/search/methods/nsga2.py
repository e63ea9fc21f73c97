"""NSGA-II alone, from DEAP: random start, uniform crossover and mutation, repair."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from deap.base import Fitness
from deap.tools import cxUniform, mutUniformInt, selNSGA2, selTournamentDCD

from benchmarks.search.run import Run, until_spent
from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import repair
from peft_autoqra.search_space import Candidate

NUM_GENERATIONS = 4  # that the cost shall last for
CROSSOVER_PROBABILITY = 0.9  # Deb et al. 2002
NUM_MUTATED = 2.0  # variables of a child, on average


class LossAndBytes(Fitness):  # type: ignore[misc]
    """Both minimized."""

    weights = (-1.0, -1.0)


class Individual(list[int]):
    """Ladder positions, flattened, with the fitness where DEAP looks for it."""

    def __init__(self, candidate: Candidate, loss: float, total_bytes: int) -> None:
        """An evaluated candidate."""
        super().__init__(position for choice in candidate for position in choice)
        self.fitness = LossAndBytes((loss, float(total_bytes)))


@until_spent
def nsga2(run: Run, seed: int) -> None:
    """Evolve (loss, bytes) at the highest level; the population is a multiple of four, as DEAP's tournament needs."""
    rng = np.random.default_rng(seed)
    size = max(4, int(run.budget / NUM_GENERATIONS) // 4 * 4)
    with seeded_random(seed):
        population = [_evaluated(run, run.problem.space.sample(rng)) for _ in range(size)]
        while True:
            population = selNSGA2(population, size)  # assigns the crowding distances that the tournament uses
            parents = selTournamentDCD(population, size)
            for first, second in zip(parents[::2], parents[1::2], strict=True):
                population += [_evaluated(run, child) for child in _children(run, first, second)]


def _children(run: Run, first: Individual, second: Individual) -> list[Candidate]:
    one, two = list(first), list(second)
    if random.random() < CROSSOVER_PROBABILITY:
        cxUniform(one, two, indpb=0.5)
    tops = (run.problem.space.num_rungs - 1).ravel().tolist()
    for child in (one, two):
        mutUniformInt(child, [0] * len(child), tops, indpb=NUM_MUTATED / len(child))
    return [run.problem.space.from_array(np.reshape(child, (-1, 2))) for child in (one, two)]


def _evaluated(run: Run, candidate: Candidate) -> Individual:
    repaired = repair(run.problem, candidate, ImportancePriors.from_problem(run.problem))
    resolved, evaluation = run.evaluate(repaired)
    return Individual(resolved, evaluation.loss, run.problem.total_bytes(resolved))


@contextmanager
def seeded_random(seed: int) -> Iterator[None]:
    """DEAP draws from Python's global generator: seed it, and leave it as it was."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
