"""A setting of the fine-tuning benchmark on a tiny model and data made in-process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.finetune.setting import Recipe, Setting
from benchmarks.finetune.tasks import SplitSizes, Task
from tests.tiny_data import token_dataset, word_tokenizer

TINY_RECIPE = Recipe(max_steps=200, batch_size=2, max_length=16, learning_rate=1e-3)


@dataclass(frozen=True, kw_only=True)
class TinySetting(Setting):
    """Nothing is read but what the setting itself keeps.

    Attributes:
        make_base: the unquantized model, fresh each time.
    """

    make_base: Callable[[], PreTrainedModel]
    model_id: str = "tiny"
    task_name: str = "counting"
    sizes: SplitSizes = field(default_factory=lambda: SplitSizes(train=24, dev=8, test=8))
    recipe: Recipe = TINY_RECIPE

    @cached_property
    def task(self) -> Task:
        """Sequences that mostly count, their second halves to be written."""
        sizes = (self.sizes.train, self.sizes.dev, self.sizes.test)
        splits = [_texts(token_dataset(seed, size)) for seed, size in enumerate(sizes)]
        return Task(
            name="counting", train=splits[0], dev=splits[1], test=splits[2], metric="exact_match", max_new_tokens=8
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of words."""
        return word_tokenizer()

    def load_base(self) -> PreTrainedModel:
        """In bfloat16, as files are loaded."""
        return self.make_base().to(torch.bfloat16)


def _texts(tokens: Dataset) -> Dataset:
    words = [[f"w{token}" for token in row] for row in tokens["input_ids"]]
    return Dataset.from_dict(
        {
            "prompt": [" ".join(row[:6]) for row in words],
            "completion": [" " + " ".join(row[6:]) for row in words],
        }
    )
