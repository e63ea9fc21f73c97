"""Trials: what was evaluated, how thoroughly, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from peft_autoqra.plan import BitRankPlan


class TrialStatus(str, Enum):
    """How a trial ended."""

    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, order=True)
class Fidelity:
    """How thoroughly a plan is evaluated.

    Attributes:
        num_steps: training steps of the plan's own adapters before the held-out loss is taken; 0 trains none.
        num_eval_sequences: held-out sequences that are scored.
        seed: of the training run; decides the order of the data.
        shared_steps: training steps of the weight-sharing supernet whose adapters the plan borrows (``num_steps`` is 0
            then); 0 borrows none.
        learning_rate_factor: the recipe's learning rate is multiplied by it.
    """

    num_steps: int
    num_eval_sequences: int
    seed: int = 0
    shared_steps: int = 0
    learning_rate_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Outcome of one evaluation.

    Attributes:
        status: a failed trial has an error and no loss.
        loss: held-out loss, nats per token; None when failed.
        sequence_losses: loss of each held-out sequence in order, for paired comparisons.
        seconds: wall-clock time of the evaluation.
        metrics: further figures.
        error: what went wrong.
    """

    status: TrialStatus
    seconds: float
    loss: float | None = None
    sequence_losses: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluated plan.

    Attributes:
        number: position in the log, from 0.
        origin: who proposed it: ``"baseline"``, ``"allocation"``, ``"evolution"``, ``"trust_region"``, ...
        plan: what was evaluated.
        fidelity: how thoroughly.
        total_bytes: memory of the plan in the scope of the budget.
        result: the outcome.
    """

    number: int
    origin: str
    plan: BitRankPlan
    fidelity: Fidelity
    total_bytes: int
    result: TrialResult

    @property
    def loss(self) -> float | None:
        """Shortcut for ``result.loss``."""
        return self.result.loss


class Evaluator(Protocol):
    """Evaluates plans; knows models and data, and nothing of searching."""

    def evaluate(self, plan: BitRankPlan, fidelity: Fidelity) -> TrialResult:
        """Evaluate one plan. A plan that cannot be evaluated gives a failed result, not an exception."""
        ...
