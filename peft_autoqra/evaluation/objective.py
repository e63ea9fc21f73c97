"""What a model can be judged by beside its held-out loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_autoqra.objective_info import ObjectiveInfo

MAX_NEW_TOKENS = 32
GENERATED_TOKEN = 6.0
"""Scored tokens that a generated one costs: its matrix products are as many, but small. Measured on a CPU with a Llama
of 8 layers and 8 prompts at a time: 5.8 to 6.7."""


@dataclass(frozen=True)
class HeldOutExamples:
    """Held-out data as it was given, for objectives that prepare it themselves.

    Attributes:
        examples: in any format that SFTTrainer takes.
        processing_class: the tokenizer.
        batch_size: sequences that are passed through the model together.
        max_length: tokens of a sequence at most; None for any number.
        mean_tokens: of a sequence, as the held-out loss is taken on it.
    """

    examples: Dataset
    processing_class: PreTrainedTokenizerBase
    batch_size: int
    max_length: int | None
    mean_tokens: float


@dataclass(frozen=True)
class Score:
    """A figure of one model.

    Attributes:
        value: of all examples.
        example_values: in the order of the examples; their mean is the value, and the differences between two models'
            tell how sure the difference of their figures is. Empty where nothing is known of single examples.
    """

    value: float
    example_values: tuple[float, ...] = ()


class Objective(Protocol):
    """Judges a model; a search minimizes it, or maximizes it where greater is better.

    Attributes:
        info: how it is called, and which direction is better.
        identity: tells it from others that are called the same; two searches with the same one are the same search.
    """

    info: ObjectiveInfo
    identity: str

    def check(self, examples: Dataset) -> None:
        """Refuse data that it cannot judge a model by; called before a model is loaded.

        Raises:
            EvaluationError: what the data lacks.
        """
        ...

    def tokens_per_example(self, data: HeldOutExamples) -> float:
        """What judging takes, in tokens passed forward per example on average; from counts, not from clocks."""
        ...

    def score(self, model: nn.Module, data: HeldOutExamples, num_examples: int) -> Score:
        """Judge a model on the first so many examples, or on all where there are fewer.

        Raises:
            ArithmeticError: the figure is not finite.
        """
        ...
