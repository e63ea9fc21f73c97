"""Trials: what was evaluated, how thoroughly, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Protocol

from peft_autoqra.plan import BitRankPlan, LayerPlan, QuantizerSettings


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
        loss: held-out loss, nats per token; of a search with another objective that figure, or its negative where
            greater is better; None when failed.
        sequence_losses: loss of each held-out sequence in order, for paired comparisons; of another objective the
            values whose mean is the loss.
        seconds: wall-clock time of the evaluation.
        metrics: further figures; with another objective its figure by its name, and ``"held_out_loss"``.
        error: what went wrong.
        ended_seconds: when it was told, on the wall clock of the search's trials, interruptions left out; None where
            nobody looked at one.
    """

    status: TrialStatus
    seconds: float
    loss: float | None = None
    sequence_losses: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    ended_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"status": self.status.value}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TrialResult:
        """Undo :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the record is damaged.
        """
        status, losses = TrialStatus(record["status"]), tuple(record["sequence_losses"])
        return cls(**{**record, "status": status, "sequence_losses": losses})


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One plan to be evaluated, or evaluated.

    Attributes:
        number: in the order of asking, from 0.
        origin: who proposed it: ``"baseline"``, ``"allocation"``, ``"evolution"``, ``"trust_region"``,
            ``"confirmation"``; of a plan from outside of the search space with its name, ``"baseline:qlora-4bit"``.
        plan: what is evaluated.
        fidelity: how thoroughly.
        total_bytes: memory of the plan in the scope of the budget.
        cost: booked for it, in units of one full fine-tune.
        result: the outcome; None before there is one.
    """

    number: int
    origin: str
    plan: BitRankPlan
    fidelity: Fidelity
    total_bytes: int
    cost: float = 0.0
    result: TrialResult | None = None

    @property
    def loss(self) -> float | None:
        """Of its result (see :class:`TrialResult`); None where there is none, or none yet."""
        return self.result.loss if self.result is not None else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with all that decides the outcome: enough to evaluate the plan in another process."""
        plan = self.plan
        record = {
            "number": self.number,
            "origin": self.origin,
            "plan": {
                "layers": {name: [layer.bits, layer.rank] for name, layer in plan.items()},
                "shapes": plan.shapes,
                "quantizer": asdict(plan.quantizer),
                "initialization": plan.initialization,
            },
            "fidelity": asdict(self.fidelity),
            "total_bytes": self.total_bytes,
            "cost": self.cost,
        }
        return record if self.result is None else record | {"result": self.result.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Trial:
        """Undo :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the record is damaged.
        """
        plan, result = record["plan"], record.get("result")
        return cls(
            number=record["number"],
            origin=record["origin"],
            plan=BitRankPlan(
                {name: LayerPlan(bits, rank) for name, (bits, rank) in plan["layers"].items()},
                shapes={name: (n, k) for name, (n, k) in plan["shapes"].items()},
                quantizer=QuantizerSettings(**plan["quantizer"]),
                initialization=plan["initialization"],
            ),
            fidelity=Fidelity(**record["fidelity"]),
            total_bytes=record["total_bytes"],
            cost=record["cost"],
            result=None if result is None else TrialResult.from_dict(result),
        )


class Evaluator(Protocol):
    """Evaluates plans; knows models and data, and nothing of searching."""

    def evaluate(self, plan: BitRankPlan, fidelity: Fidelity) -> TrialResult:
        """Evaluate one plan. A plan that cannot be evaluated gives a failed result, not an exception."""
        ...
