"""Objectives by the names that recipes and flags have for them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_autoqra.errors import EvaluationError
from peft_autoqra.evaluation.harness_tasks import PREFIX, TaskObjective
from peft_autoqra.evaluation.objective import MAX_NEW_TOKENS, HeldOutExamples, Objective, Score
from peft_autoqra.objective_info import ObjectiveInfo

if TYPE_CHECKING:
    from evaluate import EvaluationModule

LOSS = "loss"
ExampleLosses = Callable[[nn.Module, PreTrainedTokenizerBase, Dataset], Sequence[float]]
"""Model, tokenizer and examples to one loss for each example, lower being better."""


def make_objective(
    wanted: str | Objective | EvaluationModule | ExampleLosses, *, max_new_tokens: int = MAX_NEW_TOKENS
) -> Objective | None:
    """What a name stands for; None is the held-out loss, which every trial takes anyway.

    Args:
        wanted: ``"loss"``; ``"accuracy"``, ``"exact_match"``, the path of a metric's script or its name on the hub,
            each with ``":KEY"`` where it gives several figures; ``"lm_eval:TASK"`` or ``"lm_eval:TASK:METRIC"``; a
            metric of the `evaluate` library; a function (see :data:`ExampleLosses`); or an objective.
        max_new_tokens: of texts that a metric is of.

    Raises:
        EvaluationError: no such metric or task.
        MissingDependencyError: lm-evaluation-harness is needed and not installed.
    """
    if wanted == LOSS:
        return None
    if isinstance(wanted, str) and wanted.startswith(PREFIX):
        return TaskObjective(*_split(wanted.removeprefix(PREFIX)))
    if hasattr(wanted, "score"):
        return wanted  # type: ignore[return-value]
    if callable(wanted):
        return FunctionObjective(wanted)
    # It takes a second to import, and most searches need no metric.
    from evaluate import EvaluationModule  # noqa: PLC0415

    from peft_autoqra.evaluation.metric_objective import MetricObjective  # noqa: PLC0415

    if isinstance(wanted, str):
        return MetricObjective.named(*_split(wanted), max_new_tokens)
    if isinstance(wanted, EvaluationModule):
        return MetricObjective(wanted, max_new_tokens=max_new_tokens)
    raise EvaluationError(f"objective={wanted!r} is no name, metric, function or objective.")


class FunctionObjective:
    """A function of model, tokenizer and examples as an :class:`~peft_autoqra.evaluation.objective.Objective`.

    Args:
        function: gives one loss for each example, lower being better. It is called without gradients. Searches know it
            again by its name and source text, not by what it takes from elsewhere.
    """

    def __init__(self, function: ExampleLosses) -> None:
        """Call it by its own name."""
        self._function = function
        name = getattr(function, "__name__", type(function).__name__)
        self.info = ObjectiveInfo(name, greater_is_better=False)
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            source = name
        self.identity = f"{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}"

    def check(self, examples: Dataset) -> None:
        """The function itself knows what it needs."""

    def tokens_per_example(self, data: HeldOutExamples) -> float:
        """As many as the held-out loss takes, for want of anything better."""
        return data.mean_tokens

    def score(self, model: nn.Module, data: HeldOutExamples, num_examples: int) -> Score:
        """See :class:`~peft_autoqra.evaluation.objective.Objective`.

        Raises:
            EvaluationError: it does not give one loss for each example.
        """
        examples = data.examples.select(range(min(num_examples, len(data.examples))))
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                losses: Any = self._function(model, data.processing_class, examples)
        finally:
            model.train(was_training)
        values = tuple(map(float, losses)) if hasattr(losses, "__len__") else ()
        if len(values) != len(examples):
            raise EvaluationError(
                f"The objective {self.info.name!r} gave {losses!r} for {len(examples)} examples; it has to give one "
                "loss for each."
            )
        return Score(sum(values) / len(values), values)


def _split(name: str) -> tuple[str, str | None]:
    """``NAME:KEY`` in two; a drive's colon is none."""
    path, _, key = name.rpartition(":")
    return (path, key) if path and key.isidentifier() else (name, None)
