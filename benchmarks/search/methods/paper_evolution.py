"""AutoQRA's stage 1: NSGA-II on low-fidelity evaluations, of which a surrogate promotes a few."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from deap.tools import selNSGA2

from benchmarks.search.methods.nsga2 import Individual
from benchmarks.search.methods.paper_surrogate import PaperSurrogate
from benchmarks.search.run import PoolEmpty, Run
from peft_autoqra.importance.priors import ImportancePriors, round_priors
from peft_autoqra.importance.repair import repair
from peft_autoqra.search.operators import coupled_mutation, guided_mutation
from peft_autoqra.search.pareto import ParetoPoint, hypervolume
from peft_autoqra.search_space import Candidate

POPULATION, PROMOTED, NUM_GENERATIONS = 40, 6, 12
MIN_POPULATION = 8
COUPLED_PROBABILITY = 0.3
CROSSOVER_PROBABILITY = 0.9  # Deb et al. 2002; the paper does not say
JITTER_PROBABILITY = 0.3  # of a variable of the warm start moving a rung; the paper does not say
HYPERVOLUME_TOLERANCE, HYPERVOLUME_PATIENCE = 1e-3, 3


class PaperEvolution:
    """State of stage 1 within one run.

    Args:
        run: evaluates; level 0 is the low fidelity and the highest level the high one. With one level they are the
            same and nothing needs promotion.
        cost: that this stage may spend; population and promotions are scaled down together so that the published
            number of generations fits.
        seed: of the stage's generator.
    """

    def __init__(self, run: Run, cost: float, seed: int) -> None:
        """Scale the population to the cost."""
        self.run, self.problem = run, run.problem
        self.cost_end = run.cost + cost
        self.rng = np.random.default_rng(seed)
        self.priors = ImportancePriors.from_problem(run.problem)
        self.surrogate = PaperSurrogate(run.problem, self.priors, seed)
        low_cost = run.environment.level_costs[0]
        per_candidate = low_cost + (PROMOTED / POPULATION if run.top_level else 0.0)
        self.population_size = min(POPULATION, max(MIN_POPULATION, int(cost / NUM_GENERATIONS / per_candidate)))
        self.num_promoted = max(1, round(PROMOTED * self.population_size / POPULATION))
        self.low: dict[Candidate, float] = {}
        self.high: dict[Candidate, float] = {}
        self.hypervolumes: list[float] = []
        self._reference_loss: float | None = None  # the first generation's worst

    def evolve(self) -> None:
        """Generations until the published number, the stall of the hypervolume, or the end of the stage's cost."""
        self._evaluate_generation(self._warm_start())
        for _ in range(NUM_GENERATIONS - 1):
            if self._is_stalled() or not self._may_spend(self.run.environment.level_costs[0]):
                return
            population = selNSGA2(self._individuals(), min(self.population_size, len(self.low)))
            self._evaluate_generation([self._child(population) for _ in range(self.population_size)])

    def _warm_start(self) -> list[Candidate]:
        """The priors rounded (Eq. 6), and copies of it with jitter."""
        space = self.problem.space
        seed = round_priors(space, self.priors)
        population = [repair(self.problem, seed, self.priors)]
        for _ in range(self.population_size - 1):
            moves = self.rng.integers(0, 2, size=(space.num_groups, 2)) * 2 - 1
            moves *= self.rng.random(moves.shape) < JITTER_PROBABILITY
            positions = np.clip(space.as_array(seed) + moves, 0, space.num_rungs - 1)
            population.append(repair(self.problem, space.from_array(positions), self.priors))
        return population

    def _child(self, population: list[Individual]) -> Candidate:
        space = self.problem.space
        first, second = (np.reshape(self._parent(population), (-1, 2)) for _ in range(2))
        if self.rng.random() < CROSSOVER_PROBABILITY:
            first = np.where(self.rng.random(len(first))[:, None] < 0.5, first, second)
        child = repair(self.problem, space.from_array(first), self.priors)
        mutate = coupled_mutation if self.rng.random() < COUPLED_PROBABILITY else guided_mutation
        return mutate(self.problem, self.priors, child, self.rng)

    def _parent(self, population: list[Individual]) -> Individual:
        """Binary tournament; a population from DEAP's selection is ordered by front, best first."""
        return population[int(self.rng.integers(len(population), size=2).min())]

    def _evaluate_generation(self, candidates: list[Candidate]) -> None:
        with suppress(PoolEmpty):
            for candidate in candidates:
                if candidate not in self.low and self._may_spend(self.run.environment.level_costs[0]):
                    resolved, evaluation = self.run.evaluate(candidate, level=0)
                    self.low[resolved] = evaluation.loss
        if self.run.top_level:
            self._promote()
        else:
            self.high.update(self.low)
        points = [ParetoPoint(c, loss, self.problem.total_bytes(c)) for c, loss in self.high.items()]
        if self._reference_loss is None:
            self._reference_loss = max(self.high.values(), default=None)
        if self._reference_loss is not None:
            self.hypervolumes.append(hypervolume(points, self._reference_loss, self.problem.budget_bytes + 1))

    def _promote(self) -> None:
        """Evaluate what the surrogate expects most of at high fidelity, and learn from it."""
        waiting = [(candidate, loss) for candidate, loss in self.low.items() if candidate not in self.high]
        predicted = self.surrogate.predict(waiting) if waiting else []
        for index in np.argsort(predicted, kind="stable")[: self.num_promoted]:
            if self._may_spend(1.0):
                resolved, evaluation = self.run.evaluate(waiting[index][0])
                self.high[resolved] = evaluation.loss
        known = [(c, self.low[c]) for c in self.high if c in self.low]
        if len(known) >= 2:
            self.surrogate.fit(known, [self.high[c] for c, _ in known])

    def _individuals(self) -> list[Individual]:
        """All candidates with their high-fidelity loss, or what the surrogate expects of it."""
        losses = dict(zip(self.low, self.surrogate.predict(list(self.low.items())), strict=True)) | self.high
        return [Individual(c, loss, self.problem.total_bytes(c)) for c, loss in losses.items()]

    def _may_spend(self, cost: float) -> bool:
        return self.run.cost + cost <= self.cost_end + 1e-9

    def _is_stalled(self) -> bool:
        if len(self.hypervolumes) <= HYPERVOLUME_PATIENCE:
            return False
        before, now = self.hypervolumes[-1 - HYPERVOLUME_PATIENCE], self.hypervolumes[-1]
        return now - before < HYPERVOLUME_TOLERANCE * max(before, 1e-300)
