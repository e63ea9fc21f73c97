"""Judging a model by held-out loss, metrics and tasks, alone or beside another one."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_autoqra.evaluation.harness_tasks import HarnessTasks
from peft_autoqra.evaluation.held_out import held_out_loss
from peft_autoqra.evaluation.objective import Objective, Score
from peft_autoqra.evaluation.sft import SFTData
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.paired import paired_difference

EQUAL = 1e-9
"""Values by example that differ by a smaller share are the same but for rounding."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one model, or of the difference of two.

    Attributes:
        name: such as ``"accuracy"``.
        value: the figure.
        standard_error: over examples; None where it is not known: with one example, or where all gave the same,
            which does not mean that all others would.
        interval: 95% confidence interval over examples; None likewise.
        num_values: examples, or groups of them, that the interval is over.
        greater_is_better: direction.
        unit: such as ``"nats per token"``.
    """

    name: str
    value: float
    standard_error: float | None
    interval: tuple[float, float] | None
    num_values: int
    greater_is_better: bool
    unit: str = ""

    @property
    def verdict(self) -> str:
        """Of a difference: what it says of the first model."""
        if self.interval is None:
            return "the same" if self.value == 0 else "unknown"
        if self.interval[0] <= 0 <= self.interval[1]:
            return "not different beyond the interval"
        return "better" if (self.value > 0) == self.greater_is_better else "worse"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Outcome of an evaluation.

    Attributes:
        model: hub id or folder.
        figures: of the model.
        baseline: hub id or folder of the model that it is compared with; None without.
        baseline_figures: of that, in the same order.
        differences: model minus baseline, paired example by example, of the figures that allow it: not of losses per
            token where the two have different tokens.
        num_examples: held-out examples; 0 where only tasks were run.
        seconds: wall-clock time.
    """

    model: str
    figures: tuple[Figure, ...]
    baseline: str | None = None
    baseline_figures: tuple[Figure, ...] = ()
    differences: tuple[Figure, ...] = ()
    num_examples: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        differences = [asdict(figure) | {"verdict": figure.verdict} for figure in self.differences]
        return asdict(self) | {"differences": differences}


@dataclass(frozen=True)
class JudgedBy:
    """What models are judged by, and on what.

    Attributes:
        dataset: held-out data in any format that SFTTrainer takes; None for tasks alone.
        objectives: figures beside the held-out loss.
        tasks: of lm-evaluation-harness; None for none.
        args: decides how data is prepared, and the batch size.
        limit: examples at most; None for all.
        show_progress: show the tasks' progress bars.
    """

    dataset: Dataset | None
    objectives: Sequence[Objective]
    tasks: HarnessTasks | None
    args: SFTConfig
    limit: int | None = None
    show_progress: bool = False


@dataclass(frozen=True)
class Judged:
    """One figure of a model with its values by example.

    Attributes:
        info: how it is called.
        score: its values.
        num_tokens: of each example, where values are per token: of models that cut the same text into other tokens
            they cannot be compared.
    """

    info: ObjectiveInfo
    score: Score
    num_tokens: tuple[int, ...] = ()

    @property
    def figure(self) -> Figure:
        """With its interval."""
        return _figure(self.info, self.score.value, self.score.example_values)


def judge(model: nn.Module, tokenizer: PreTrainedTokenizerBase, by: JudgedBy) -> list[Judged]:
    """Every figure of a model.

    Args:
        model: causal language model.
        tokenizer: of the model.
        by: see :class:`JudgedBy`.

    Raises:
        CalibrationError: data that SFTTrainer cannot prepare, or without a token to predict.
        EvaluationError: data that a metric cannot be computed on.
        ArithmeticError: a figure is not finite.
    """
    judged = []
    if by.dataset is not None:
        data = prepare(by.dataset, tokenizer, by.args)
        num = len(by.dataset) if by.limit is None else by.limit
        loss = held_out_loss(model, data.batches(data.held_out, num))
        judged.append(Judged(HELD_OUT_LOSS, Score(loss.mean, loss.weighted_losses), loss.num_tokens))
        judged += [Judged(one.info, one.score(model, data.examples, num)) for one in by.objectives]
    if by.tasks is not None:
        batch_size = by.args.per_device_eval_batch_size
        scores = by.tasks.score(
            model, tokenizer, batch_size=batch_size, limit=by.limit, show_progress=by.show_progress
        )
        judged += [Judged(found.info, found.score) for found in scores]
    return judged


def prepare(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> SFTData:
    """Held-out data as a fine-tune with the recipe would see it, one text a sequence.

    SFTTrainer prepares it, which wants a model to train: it gets a tiny one, since it refuses quantized models, and
    changes others.

    Raises:
        CalibrationError: data that SFTTrainer cannot prepare, or without a token to predict.
    """
    unpacked = copy.copy(args)
    unpacked.packing, unpacked.eval_packing, unpacked.padding_free = False, None, False
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng(devices=[]):
        stand_in = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **settings))
    return SFTData(stand_in, unpacked, dataset.select(range(1)), dataset, tokenizer)


def result_of(
    names: Sequence[str], judged: Sequence[Sequence[Judged]], *, num_examples: int, start: float
) -> EvaluationResult:
    """The outcome for a model, and for its baseline where there is one.

    Args:
        names: of one or two models.
        judged: their figures, from :func:`judge`.
        num_examples: held-out examples.
        start: ``time.perf_counter()`` before.
    """
    first, second = judged[0], judged[1] if len(judged) > 1 else ()
    return EvaluationResult(
        model=names[0],
        figures=tuple(one.figure for one in first),
        baseline=names[1] if len(names) > 1 else None,
        baseline_figures=tuple(one.figure for one in second),
        differences=tuple(_differences(first, second)),
        num_examples=num_examples,
        seconds=time.perf_counter() - start,
    )


def _differences(first: Sequence[Judged], second: Sequence[Judged]) -> list[Figure]:
    """Of the figures that both have for the same examples."""
    found = []
    for one, other in zip(first, second, strict=False):
        values, others = one.score.example_values, other.score.example_values
        if one.info == other.info and values and len(values) == len(others) and one.num_tokens == other.num_tokens:
            difference = [value - other for value, other in zip(values, others, strict=True)]
            found.append(_figure(one.info, one.score.value - other.score.value, difference))
    return found


def _figure(info: ObjectiveInfo, value: float, values: Sequence[float]) -> Figure:
    """With the interval of the mean of values by example."""
    margin = None
    if len(values) > 1 and max(values) - min(values) > EQUAL * max(map(abs, values)):
        margin = paired_difference([values], [[0.0] * len(values)])
    return Figure(
        name=info.name,
        value=value,
        standard_error=margin.standard_error if margin else None,
        interval=margin.interval if margin else None,
        num_values=len(values),
        greater_is_better=info.greater_is_better,
        unit=info.unit,
    )
