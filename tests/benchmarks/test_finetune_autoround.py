"""AutoRound's allocations: the committed ones are whole, and plans of them use a budget without exceeding it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.method import NotApplicable
from benchmarks.finetune.methods.autoround import ALLOCATIONS, AutoRoundBits
from peft_autoqra import MemoryModel

FILES = sorted(ALLOCATIONS.glob("SmolLM2-135M-Instruct-*.json"))
SCALE_BITS = 16
RANKS = {
    "qlora-4bit-r16": 16,
    "qlora-3bit-r16": 8,
    "qlora-2.5bit-r16": 8,
    "0.75*qlora-4bit-r16": 8,
    "stored:qlora-4bit-r16": 16,
    "stored:qlora-2.5bit-r16": 8,
}
"""Those of the sequential allocation."""


@pytest.fixture(scope="module")
def smollm2():
    """The shapes of SmolLM2-135M."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return MemoryModel.from_model(LlamaForCausalLM(config).to(torch.bfloat16))


def test_every_task_made_of_registry_packages_has_an_allocation():
    assert {path.stem.rpartition("-")[2] for path in FILES} == {"reviews", "headlines", "quartz"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_allocations_give_every_module_bits_of_the_average_they_were_asked_for(path, smollm2):
    content = json.loads(path.read_text("utf-8"))
    assert len(content["modules"]) == 210
    assert set(content["modules"]) == set(smollm2.modules)
    sizes = [smollm2.modules[name].num_weights for name in content["modules"]]
    for allocation in content["allocations"]:
        bits = [_bits_with_metadata(bits, content["group_size"]) for bits in allocation["bits"]]
        average = sum(width * size for width, size in zip(bits, sizes, strict=True)) / sum(sizes)
        assert set(allocation["bits"]) <= set(content["options"])
        assert allocation["avg_bits"] - 0.01 < average <= allocation["avg_bits"]


@pytest.mark.parametrize("budget", RANKS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_allocations_fill_the_budgets_to_half_a_percent(path, budget, smollm2):
    limit = limit_of(budget, smollm2)
    layers = AutoRoundBits.read(path).within(limit, smollm2, RANKS[budget])
    assert set(layers) == set(smollm2.modules)
    assert {layer.rank for layer in layers.values()} == {RANKS[budget]}
    assert 0.995 < smollm2.estimate(layers).in_scope(limit.scope) / limit.limit_bytes <= 1


def test_takes_the_most_bits_that_fit_to_the_byte(tiny_llama):
    model = MemoryModel.from_model(tiny_llama())
    layouts = tuple(dict.fromkeys(model.modules, bits) for bits in (4, 2, 3))
    known = AutoRoundBits(layouts=layouts, seconds=1.0, scored_tokens=1)
    just = model.estimate(model.uniform(3, 4)).total_bytes
    assert known.within(limit_of(str(just), model), model, 4) == model.uniform(3, 4)
    assert known.within(limit_of(str(just - 1), model), model, 4) == model.uniform(2, 4)


def test_says_why_there_is_no_plan(tiny_llama, tmp_path):
    model = MemoryModel.from_model(tiny_llama())
    bits = AutoRoundBits(layouts=(dict.fromkeys(model.modules, 4),), seconds=1.0, scored_tokens=1)
    with pytest.raises(NotApplicable, match=r"within 1,000 bytes"):
        bits.within(limit_of("1000", model), model, 4)
    others = AutoRoundBits(layouts=({"model.elsewhere": 4},), seconds=1.0, scored_tokens=1)
    with pytest.raises(NotApplicable, match="other modules"):
        others.within(limit_of("1GB", model), model, 4)
    with pytest.raises(NotApplicable, match="allocate_autoround"):
        AutoRoundBits.read(Path(tmp_path) / "none.json")


def _bits_with_metadata(bits: int, group_size: int) -> float:
    """As AutoRound counts: a scale and a zero for every group, none at 16 bits."""
    return bits if bits == 16 else bits + (SCALE_BITS + bits) / group_size
