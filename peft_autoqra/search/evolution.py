"""Stage 1: NSGA-II over (loss, bytes) within the budget, warm-started and guided by importance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from deap.base import Fitness
from deap.tools import selNSGA2

from peft_autoqra.importance.priors import ImportancePriors, round_priors
from peft_autoqra.importance.repair import fill, repair
from peft_autoqra.search.operators import block_crossover, coupled_mutation, guided_mutation, swap_mutation
from peft_autoqra.search.pareto import ParetoPoint, hypervolume, nondominated
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

MAX_ATTEMPTS_PER_CANDIDATE = 30


@dataclass(frozen=True, kw_only=True)
class EvolutionSettings:
    """How the population evolves; the defaults are AutoQRA's where it has them.

    Attributes:
        population_size: survivors per generation, and the most candidates that one ``ask`` gives.
        num_generations: generations at most, the initial population included.
        crossover_probability: of a child having two parents.
        coupled_probability: of the coupled mutation (one variable up, the others pay).
        swap_probability: of the swap mutation; what is left to 1 is the guided mutation.
        fill_probability: of spending what a child leaves of the budget; other children extend the front downwards.
        gamma: exponent of the importance in drawing the variables to mutate.
        hypervolume_tolerance: relative growth below which the front counts as stalled.
        hypervolume_patience: generations over which that growth is taken.
        seed: of the stage's own generator.
    """

    population_size: int = 40
    num_generations: int = 12
    crossover_probability: float = 0.5
    coupled_probability: float = 0.3
    swap_probability: float = 0.2
    fill_probability: float = 0.8
    gamma: float = 1.5
    hypervolume_tolerance: float = 1e-3
    hypervolume_patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        for name in ("population_size", "num_generations", "hypervolume_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("crossover_probability", "coupled_probability", "swap_probability", "fill_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        if self.coupled_probability + self.swap_probability > 1:
            raise ValueError("coupled_probability and swap_probability must sum to at most 1.")
        for name in ("gamma", "hypervolume_tolerance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")


class _LossAndBytes(Fitness):  # type: ignore[misc]
    weights = (-1.0, -1.0)


class _Individual:
    """What DEAP selects: a point with a ``fitness``, which DEAP also writes the crowding distance to."""

    def __init__(self, point: ParetoPoint) -> None:
        self.point: ParetoPoint = point
        self.fitness = _LossAndBytes((point.loss, float(point.total_bytes)))


class EvolutionStage:
    """Ask for candidates, tell their losses, until ``is_done``.

    The budget is the one constraint, and every candidate is repaired to it before it is asked for, so constrained
    domination comes down to domination. The first batch holds the initial candidates, the paper's rounding of the
    priors and candidates that noisy repairs lead to from the top of the ladders. Neither DEAP's ``creator`` nor the
    global ``random`` is used; equal arguments and equal tells give equal asks.

    Args:
        problem: space, tables and budget.
        settings: see :class:`EvolutionSettings`.
        initial_candidates: evaluated first; those above the budget are repaired to it, repeats dropped.
    """

    def __init__(
        self, problem: SearchProblem, settings: EvolutionSettings, initial_candidates: Sequence[Candidate] = ()
    ) -> None:
        """Price the steps of the ladders; nothing is evaluated yet."""
        self.problem, self.settings = problem, settings
        self.generation = 0
        self.hypervolumes: list[float] = []
        self._importance = ImportancePriors.from_marginal_losses(problem)
        self._rng = np.random.default_rng(settings.seed)
        self._seeds = [repair(problem, candidate, self._importance) for candidate in initial_candidates]
        self._seeds.append(repair(problem, round_priors(problem.space, self._importance), self._importance))
        self._population: list[_Individual] = []
        self._archive: dict[Candidate, ParetoPoint | None] = {}  # None: failed
        self._pending: list[Candidate] = []
        self._reference_loss: float | None = None
        self._is_exhausted = False

    @property
    def is_done(self) -> bool:
        """Generations used up, hypervolume stalled, or nothing new found within reach."""
        return self.generation >= self.settings.num_generations or self._is_stalled() or self._is_exhausted

    def ask(self) -> list[Candidate]:
        """The next generation: feasible candidates, none asked for before; empty when the stage is done.

        While some of the last batch have not been told, those are given again.
        """
        if not self._pending and not self.is_done:
            proposals = self._offspring() if self.generation else self._initial_population()
            self._pending = self._take_new(proposals)
            self._is_exhausted = not self._pending
        return list(self._pending)

    def tell(self, results: Sequence[tuple[Candidate, float | None]]) -> None:
        """Record losses (nats per token; None or NaN for a failed trial, which never survives).

        The generation ends when all that was asked for has been told. Candidates evaluated elsewhere may be told too.

        Raises:
            ValueError: a candidate is not feasible.
        """
        for candidate, loss in results:
            self._record(candidate, loss)
        told = self._pending and all(candidate in self._archive for candidate in self._pending)
        self._pending = [candidate for candidate in self._pending if candidate not in self._archive]
        if told:
            self._end_generation()

    def pareto_front(self) -> list[ParetoPoint]:
        """Nondominated candidates among all that were told, by growing bytes."""
        return nondominated(point for point in self._archive.values() if point is not None)

    def _record(self, candidate: Candidate, loss: float | None) -> None:
        if not self.problem.is_feasible(candidate):
            raise ValueError(f"A candidate that was told is off the ladders or above the budget: {candidate[:4]}...")
        failed = loss is None or not math.isfinite(loss)
        self._archive[candidate] = (
            None if failed else ParetoPoint(candidate, float(loss or 0.0), self.problem.total_bytes(candidate))
        )

    def _end_generation(self) -> None:
        self.generation += 1
        alive = [_Individual(point) for point in self._archive.values() if point is not None]
        self._population = selNSGA2(alive, min(self.settings.population_size, len(alive))) if alive else []
        if self._reference_loss is None and alive:
            self._reference_loss = float(np.median([individual.point.loss for individual in alive]))
        volume = 0.0
        if self._reference_loss is not None:
            volume = hypervolume(self.pareto_front(), self._reference_loss, self.problem.budget_bytes + 1)
        self.hypervolumes.append(volume)

    def _is_stalled(self) -> bool:
        """Relative growth over the last ``hypervolume_patience`` generations is below the tolerance."""
        patience = self.settings.hypervolume_patience
        if len(self.hypervolumes) <= patience or self._reference_loss is None:
            return False
        before, now = self.hypervolumes[-1 - patience], self.hypervolumes[-1]
        return now - before < self.settings.hypervolume_tolerance * max(before, 1e-300)

    def _take_new(self, proposals: Iterator[Candidate]) -> list[Candidate]:
        """Up to ``population_size`` distinct proposals that were never evaluated."""
        batch: dict[Candidate, None] = {}
        limit = self.settings.population_size
        for _, proposal in zip(range(limit * MAX_ATTEMPTS_PER_CANDIDATE), proposals, strict=False):
            if proposal not in self._archive:
                batch[proposal] = None
            if len(batch) == limit:
                break
        return list(batch)

    def _initial_population(self) -> Iterator[Candidate]:
        """The seeds, then alternately noisy walks down from the top of the ladders and mutants of the seeds."""
        yield from self._seeds
        top = self.problem.space.from_array(self.problem.space.num_rungs - 1)
        while True:
            yield repair(self.problem, top, self._importance, self._rng)
            yield self._mutate(self._seeds[self._rng.integers(len(self._seeds))])

    def _offspring(self) -> Iterator[Candidate]:
        while True:
            first, second = self._parent(), self._parent()
            child = first
            if self._rng.random() < self.settings.crossover_probability:
                child = block_crossover(self.problem, self._importance, (first, second), self._rng)
            yield self._mutate(child)

    def _parent(self) -> Candidate:
        """Binary tournament by domination, then crowding distance (Deb et al. 2002)."""
        if not self._population:
            return self._seeds[self._rng.integers(len(self._seeds))]
        indices: list[int] = self._rng.integers(len(self._population), size=2).tolist()
        one, two = (self._population[index] for index in indices)
        if one.fitness.dominates(two.fitness):
            return one.point.candidate
        if two.fitness.dominates(one.fitness) or two.fitness.crowding_dist > one.fitness.crowding_dist:
            return two.point.candidate
        return one.point.candidate

    def _mutate(self, candidate: Candidate) -> Candidate:
        problem, importance, rng, settings = self.problem, self._importance, self._rng, self.settings
        draw = rng.random()
        if draw < settings.coupled_probability:
            mutant = coupled_mutation(problem, importance, candidate, rng, settings.gamma)
        elif draw < settings.coupled_probability + settings.swap_probability:
            mutant = swap_mutation(problem, importance, candidate, rng)
        else:
            mutant = guided_mutation(problem, importance, candidate, rng, settings.gamma)
        return fill(problem, mutant, importance, rng) if rng.random() < settings.fill_probability else mutant
