"""A setting whose model and data are made in-process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.finetune.setting import Recipe, Setting
from benchmarks.finetune.tasks import SplitSizes
from peft_autoqra.evaluation.sft import SFTData
from tests.conftest import TinyLlamaFactory
from tests.tiny_data import token_dataset, word_tokenizer

MAX_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class TinySetting(Setting):
    """Token sequences in place of a task."""

    @cached_property
    def data(self) -> SFTData:
        args = self.recipe.sft_config(self.folder)
        return SFTData(self.load_base(), args, token_dataset(0), token_dataset(1), self.tokenizer)


def tiny_setting(folder: Path, tiny_llama: TinyLlamaFactory) -> TinySetting:
    """Save a tiny Llama in bfloat16 and a tokenizer."""
    tiny_llama(attention_bias=True).to(torch.bfloat16).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    recipe = Recipe(max_steps=MAX_STEPS, batch_size=4, max_length=12, learning_rate=1e-3, attn_implementation="eager")
    return TinySetting(
        model_id=str(folder / "model"),
        task_name="tiny",
        sizes=SplitSizes(train=24, dev=24, test=24),
        recipe=recipe,
        cache_dir=folder,
    )
