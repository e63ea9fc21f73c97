"""What a search method sees of a benchmark: a problem, evaluations at several levels and their cost."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate


@dataclass(frozen=True)
class Evaluation:
    """One measured candidate.

    Attributes:
        loss: mean of the sequence losses, nats per token.
        sequence_losses: loss of each held-out sequence, in one order for all candidates.
    """

    loss: float
    sequence_losses: tuple[float, ...]


class Environment(Protocol):
    """A problem whose candidates can be evaluated, and of which the benchmark knows the truth.

    Methods may use ``problem``, ``level_costs``, ``pool`` and :meth:`evaluate` (through a ``Run``, which counts the
    cost). ``true_loss`` and ``optimum_loss`` are for the benchmark alone.
    """

    @property
    def name(self) -> str:
        """Of the landscape and its instance."""
        ...

    @property
    def problem(self) -> SearchProblem:
        """Space, exact bytes, additive proxy of the loss, budget."""
        ...

    @property
    def level_costs(self) -> tuple[float, ...]:
        """Cost of one evaluation at each fidelity level, cheapest first; the last is 1."""
        ...

    @property
    def num_seeds(self) -> int:
        """Training seeds that finalists are worth confirming with: more than one where training is noisy."""
        ...

    @property
    def pool(self) -> tuple[Candidate, ...] | None:
        """The only candidates that can be evaluated; None where all can."""
        ...

    @property
    def optimum_loss(self) -> float:
        """Least true loss of all candidates within the budget, nats per token."""
        ...

    def resolve(self, candidate: Candidate, taken: AbstractSet[Candidate]) -> Candidate | None:
        """The candidate that is evaluated in the place of a proposed one.

        Args:
            candidate: within the budget.
            taken: what the run evaluated before at the same level and seed.

        Returns:
            None where nothing is left to evaluate.
        """
        ...

    def evaluate(self, candidate: Candidate, level: int, seed: int = 0) -> Evaluation:
        """Measure a resolved candidate; the same arguments give the same result.

        Args:
            candidate: from :meth:`resolve`.
            level: index into ``level_costs``.
            seed: of the training run.
        """
        ...

    def true_loss(self, candidate: Candidate) -> float:
        """What the candidate is worth: its loss without noise at the highest level, nats per token."""
        ...
