"""A search of nine trials on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher
from peft_autoqra.search_callback import SearchCallback
from tests.tiny_data import token_dataset, word_tokenizer
from tests.tiny_evaluator import tiny_args

SETTINGS: Mapping[str, Any] = {
    "memory_budget": "qlora-4bit-r16",
    "rank_choices": [0, 2, 4],
    "bit_choices": [2, 4, 8],
    "granularity": "block",
    "num_calibration_sequences": 4,
    "num_eval_sequences": 4,
    "max_cost": 1000.0,
    "max_trials": 9,
    "num_seeds": 2,
}


def tiny_searcher(
    model: PreTrainedModel,
    output_dir: Path,
    *,
    data: tuple[Dataset, Dataset] | None = None,
    recipe: Mapping[str, Any] = {},
    callbacks: Sequence[SearchCallback] = (),
    judge: Any = None,
    **changes: Any,
) -> AutoQRASearcher:
    """Nothing long runs yet.

    Args:
        judge: what is minimized, where it is not named by ``objective`` of the settings.
        data: to train on, and held out; 24 sequences each by default.
        recipe: of the fine-tune, where it differs from two steps at learning rate 1e-3.
        changes: to ``SETTINGS``.
    """
    train, held_out = data or (token_dataset(seed=0), token_dataset(seed=1))
    return AutoQRASearcher(
        model,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=word_tokenizer(),
        args=tiny_args(output_dir / "sft", **{"learning_rate": 1e-3, "max_steps": 2} | dict(recipe)),
        search_config=AutoQRASearchConfig(output_dir=str(output_dir), **dict(SETTINGS) | changes),
        show_progress=False,
        callbacks=callbacks,
        objective=judge,
    )
