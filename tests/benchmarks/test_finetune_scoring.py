"""Figures of models on tasks whose answers are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from benchmarks.finetune.scoring import score
from tests.benchmarks.tiny_prompt_setting import TINY_RECIPE, TinySetting


@pytest.mark.usefixtures("metric_modules")
def test_written_answers_are_judged_one_by_one(tiny_llama, tmp_path: Path):
    """More examples than a metric's values have groups."""
    model = tiny_llama(num_hidden_layers=1)
    recipe = replace(TINY_RECIPE, batch_size=64)
    setting = TinySetting(cache_dir=tmp_path, recipe=recipe, make_base=lambda: model)
    tokenizer, prompts = setting.tokenizer, ["w1 w2 w3", "w4 w5 w6"]
    ids = torch.tensor([tokenizer(prompt).input_ids for prompt in prompts])
    written = model.generate(ids, max_new_tokens=setting.task.max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    rows = [
        {"prompt": prompts[i % 2], "completion": f" {texts[i % 2]}" if i % 3 == 0 else " w9 w8"} for i in range(201)
    ]
    prompt_tokens = [tokenizer(row["prompt"]).input_ids for row in rows]
    tokens = [tokenizer(row["prompt"] + row["completion"]).input_ids for row in rows]
    masks = [[0] * len(p) + [1] * (len(t) - len(p)) for p, t in zip(prompt_tokens, tokens, strict=True)]

    figures = score(
        model, setting, Dataset.from_dict({"input_ids": tokens, "completion_mask": masks}), Dataset.from_list(rows)
    )
    assert figures.right == "100" * 67
    assert figures.metric == pytest.approx(1 / 3)
