"""One run of a search method: evaluations, their summed cost, and what the method recommends at every cost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps

import numpy as np

from benchmarks.search.environment import Environment, Evaluation
from peft_autoqra.search_space import Candidate

MAX_REPEATS = 200  # evaluations in a row that were known, after which a method is taken to have nothing new


class CostSpent(Exception):
    """The next evaluation would cost more than is left, or the method has nothing new to evaluate."""


class PoolEmpty(CostSpent):
    """All of the pool was evaluated at this level and seed."""


@dataclass(frozen=True)
class Record:
    """One evaluation that was paid for.

    Attributes:
        cost: of the run so far, this evaluation included, in evaluations at the highest level.
        candidate: what was evaluated.
        level: fidelity level.
        seed: of the training run.
        loss: observed, nats per token.
        recommendation: what the method would answer if it were stopped here.
    """

    cost: float
    candidate: Candidate
    level: int
    seed: int
    loss: float
    recommendation: Candidate


class Run:
    """Evaluates for a method until the budget of cost is spent.

    An evaluation that was made before (same candidate, level and seed) is answered from the records at no cost, as a
    searcher with a log of its trials would.

    Args:
        environment: what is searched.
        budget: cost that may be spent, in evaluations at the highest level.
    """

    def __init__(self, environment: Environment, budget: float) -> None:
        """Nothing is evaluated yet."""
        self.environment, self.budget = environment, budget
        self.problem = environment.problem
        self.records: list[Record] = []
        self.cost = 0.0
        self._known: dict[tuple[int, int], dict[Candidate, Evaluation]] = {}
        self._repeats = 0

    @property
    def top_level(self) -> int:
        """Index of the highest fidelity level."""
        return len(self.environment.level_costs) - 1

    @property
    def cost_left(self) -> float:
        """Cost that may still be spent."""
        return self.budget - self.cost

    def can_afford(self, level: int = -1) -> bool:
        """Whether one more evaluation at a level fits; -1 is the highest."""
        return self.environment.level_costs[level] <= self.cost_left + 1e-9

    def evaluate(self, candidate: Candidate, level: int = -1, seed: int = 0) -> tuple[Candidate, Evaluation]:
        """Evaluate a proposal.

        Args:
            candidate: within the budget of bytes.
            level: fidelity level; -1 is the highest.
            seed: of the training run.

        Returns:
            What was evaluated in its place (the proposal itself, but for recorded tables), and the outcome.

        Raises:
            CostSpent: the evaluation would exceed the budget of cost, or the last proposals were all known; the run
                is over.
            PoolEmpty: nothing is left to evaluate at this level and seed.
            ValueError: the candidate is off the ladders or above the budget of bytes.
        """
        if not self.problem.is_feasible(candidate):
            raise ValueError(f"A proposal is off the ladders or above the budget of bytes: {candidate[:4]}...")
        level = range(len(self.environment.level_costs))[level]
        known = self._known.setdefault((level, seed), {})
        resolved = self.environment.resolve(candidate, known.keys())
        if resolved is None:
            raise PoolEmpty
        if not (resolved in known or self.can_afford(level)) or self._repeats >= MAX_REPEATS:
            raise CostSpent
        if resolved in known:
            self._repeats += 1
            return resolved, known[resolved]
        self._repeats = 0
        known[resolved] = self.environment.evaluate(resolved, level, seed)
        self.cost += self.environment.level_costs[level]
        loss = known[resolved].loss
        self.records.append(Record(self.cost, resolved, level, seed, loss, resolved))
        self.recommend(self.best_observed())
        return resolved, known[resolved]

    def best_observed(self) -> Candidate:
        """The candidate with the least loss, averaged over seeds, at the highest level that was used."""
        highest = max(record.level for record in self.records)
        losses: dict[Candidate, list[float]] = {}
        for record in self.records:
            if record.level == highest:
                losses.setdefault(record.candidate, []).append(record.loss)
        return min(losses, key=lambda candidate: float(np.mean(losses[candidate])))

    def recommend(self, candidate: Candidate) -> None:
        """Replace the answer as of the last record; without a call it is :meth:`best_observed`."""
        self.records[-1] = replace(self.records[-1], recommendation=candidate)

    def regrets(self) -> list[tuple[float, float]]:
        """Steps of the curve: cost so far, and true loss of the recommendation above the optimum's, nats per token."""
        optimum = self.environment.optimum_loss
        return [(r.cost, self.environment.true_loss(r.recommendation) - optimum) for r in self.records]


Method = Callable[[Environment, float, int], Run]
"""(environment, budget of cost, seed) to the finished run."""


def until_spent(search: Callable[[Run, int], None]) -> Method:
    """A method from a function that evaluates through a run, with a seed, until the cost is spent or it is done."""

    @wraps(search)
    def method(environment: Environment, budget: float, seed: int) -> Run:
        run = Run(environment, budget)
        with suppress(CostSpent):
            search(run, seed)
        return run

    return method
