"""What a fine-tune really holds, beside its budget, in the logs of any Trainer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_autoqra.errors import InvalidPlanError, MemoryBudgetError
from peft_autoqra.memory import MemoryBudget
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_measurement import measure_memory
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.units import format_bytes


class MemoryBudgetWarning(UserWarning):
    """A fine-tune that holds more than its budget."""


class MemoryBudgetCallback(TrainerCallback):  # type: ignore[misc]
    """Counts the bytes of a fine-tune at its first optimizer step, logs them, and warns if they exceed the budget.

    The trainer logs ``memory/weight_bytes`` and the other parts of a :class:`~peft_autoqra.MemoryEstimate`,
    ``memory/total_bytes`` and ``memory/budget_bytes``, so that every tracker gets them; at the end on GPUs
    ``memory/peak_bytes`` too, the most that PyTorch had allocated, activations included. Each process counts what it
    holds, with FSDP2 its parts of the model; the first one logs, and each one warns.

    ```python
    trainer.add_callback(MemoryBudgetCallback(trainer))
    ```

    Args:
        trainer: of a model with an AutoQRA adapter.
        budget: bytes that training may take in one process, or a :class:`~peft_autoqra.memory.MemoryBudget`. None
            takes the budget that the plan was searched for; without one nothing is warned of.

    Attributes:
        measured: bytes by part; None before the first optimizer step.

    Raises:
        InvalidPlanError: the model has no adapter of an AutoQRA plan.
        MemoryBudgetError: ``budget`` is not above 0, or neither bytes nor a budget.
    """

    def __init__(self, trainer: Trainer, budget: int | MemoryBudget | None = None) -> None:
        """Find the plan and the budget."""
        self._trainer = trainer
        self._plan = _plan_of(trainer)
        self._budget = _searched_budget(self._plan) if budget is None else _checked_budget(budget)
        self.measured: MemoryEstimate | None = None
        self._is_logged = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let the device count its peak anew."""
        if args.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(args.device)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count once: the gradients are there still, and the optimizer's states already."""
        if self.measured is not None:
            return
        self.measured = measure_memory(self._trainer.model, self._plan, kwargs["optimizer"])
        if self._budget is not None:
            _warn_if_over(self.measured, self._budget)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log what was counted; while a step ends a log would take the place of the trainer's own."""
        if self.measured is None or self._is_logged:
            return
        self._is_logged = True
        figures = self.measured.to_dict() | {"total_bytes": self.measured.total_bytes}
        if self._budget is not None:
            figures["budget_bytes"] = self._budget.limit_bytes
        self._trainer.log({f"memory/{name}": value for name, value in figures.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log the device's peak."""
        self.on_step_begin(args, state, control)  # there was one step only
        if args.device.type != "cpu":
            self._trainer.log({"memory/peak_bytes": torch.accelerator.max_memory_allocated(args.device)})


def _plan_of(trainer: Trainer) -> BitRankPlan:
    configs = getattr(trainer.model, "peft_config", {})
    plans: list[BitRankPlan] = [
        config.plan for config in configs.values() if isinstance(config, AutoQRAConfig) and config.plan is not None
    ]
    if not plans:
        raise InvalidPlanError(
            "The trainer's model has no AutoQRA adapter; wrap it with get_peft_model(model, AutoQRAConfig(...)), or "
            "give the trainer peft_config=AutoQRAConfig(...)."
        )
    return plans[0]


def _checked_budget(budget: int | MemoryBudget) -> MemoryBudget:
    if isinstance(budget, int):
        budget = MemoryBudget(budget, "training")
    if not isinstance(budget, MemoryBudget):
        raise MemoryBudgetError(
            f"budget={budget!r} must be bytes as an integer, or a MemoryBudget; "
            "peft_autoqra.memory.resolve_budget makes one of texts such as '6GB'."
        )
    if budget.limit_bytes <= 0:
        raise MemoryBudgetError(f"budget={budget.limit_bytes} must be bytes above 0, or None.")
    return budget


def _searched_budget(plan: BitRankPlan) -> MemoryBudget | None:
    limit, scope = plan.provenance.get("budget_bytes"), plan.provenance.get("budget_scope")
    if type(limit) is not int or limit <= 0 or scope not in ("training", "stored"):  # a file may say anything
        return None
    return MemoryBudget(limit, scope)


def _warn_if_over(measured: MemoryEstimate, budget: MemoryBudget) -> None:
    held = measured.in_scope(budget.scope)
    if held <= budget.limit_bytes:
        return
    parts = {
        "weights and scales": measured.weight_bytes + measured.metadata_bytes,
        "untouched modules": measured.untouched_bytes,
        "adapters": measured.adapter_bytes,
    }
    if budget.scope == "training":
        parts |= {"gradients": measured.gradient_bytes, "optimizer": measured.optimizer_bytes}
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    warnings.warn(
        f"The fine-tune holds {format_bytes(held)} ({listed}), {format_bytes(held - budget.limit_bytes)} more than "
        f"its budget of {format_bytes(budget.limit_bytes)}. Use the dtype and the optimizer that the plan was "
        "searched with, or search one for a smaller memory_budget.",
        MemoryBudgetWarning,
        stacklevel=2,
    )
