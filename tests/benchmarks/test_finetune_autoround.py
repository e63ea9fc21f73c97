"""AutoRound's allocations: the committed ones are whole, and plans of them use a budget without exceeding it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.method import NotApplicable
from benchmarks.finetune.methods.autoround import ALLOCATIONS, AutoRound, AutoRoundBits
from peft_autoqra import BitRankPlan, MemoryModel
from tests.benchmarks.tiny_prompt_setting import TinySetting

FILES = sorted(ALLOCATIONS.glob("SmolLM2-135M-Instruct-*.json"))
SCALE_BITS = 16
RANKS = {
    "qlora-4bit-r16": 16,
    "qlora-3bit-r16": 8,
    "qlora-2.5bit-r16": 8,
    "0.75*qlora-4bit-r16": 8,
    "stored:qlora-4bit-r16": 16,
    "stored:qlora-3bit-r16": 8,
    "stored:qlora-2.5bit-r16": 8,
    "stored:0.75*qlora-4bit-r16": 4,
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


@pytest.mark.parametrize("task", ["reviews", "headlines", "quartz"])
def test_all_tasks_have_an_allocation(task):
    assert ALLOCATIONS / f"SmolLM2-135M-Instruct-{task}.json" in FILES


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
def test_committed_allocations_fill_the_budgets(path, budget, smollm2):
    limit = limit_of(budget, smollm2)
    layers = AutoRoundBits.read(path).within(limit, smollm2, RANKS[budget])
    assert set(layers) == set(smollm2.modules)
    assert {layer.rank for layer in layers.values()} == {RANKS[budget]}
    assert 0.999 < smollm2.estimate(layers).in_scope(limit.scope) / limit.limit_bytes <= 1


def test_takes_the_most_bits_that_fit_to_the_byte(tiny_llama):
    model = MemoryModel.from_model(tiny_llama())
    layouts = tuple(dict.fromkeys(model.modules, bits) for bits in (4, 2, 3))
    known = AutoRoundBits(layouts=layouts, seconds=1.0, scored_tokens=1)
    just = model.estimate(model.uniform(3, 4)).total_bytes
    assert known.within(limit_of(str(just), model), model, 4) == model.uniform(3, 4)
    assert known.within(limit_of(str(just - 1), model), model, 4) == model.uniform(2, 4)


def test_writes_a_compensated_plan_and_counts_what_autoround_spent(tiny_llama, tmp_path):
    setting = TinySetting(make_base=tiny_llama, cache_dir=tmp_path)
    memory_model = MemoryModel.from_model(setting.load_base())
    names = list(memory_model.modules)
    content = {
        "modules": names,
        "allocations": [{"avg_bits": 0, "bits": [width] * (len(names) - 1) + [4]} for width in (2, 3, 16)],
        "options": [2, 3, 4, 16],
        "num_sequences": 10,
        "sequence_length": 100,
        "seconds": 1000.0,
    }
    (tmp_path / "tiny-counting.json").write_text(json.dumps(content), encoding="utf-8")
    spent = AutoRound(directory=tmp_path).allocate(setting, "qlora-4bit-r16", tmp_path / "plan")
    plan = BitRankPlan.from_pretrained(tmp_path / "plan")
    limit = limit_of("qlora-4bit-r16", memory_model).limit_bytes
    assert [plan[name].bits for name in names] == [3] * (len(names) - 1) + [4]
    assert plan.memory.total_bytes == memory_model.estimate(plan).total_bytes <= limit
    assert set(plan.calibration.corrections) == set(names)
    full_tokens = setting.recipe.max_steps * setting.recipe.batch_size * 12
    assert spent.seconds > 1000
    assert 3 * 10 * 100 * 2 / full_tokens < spent.cost < 3 * 10 * 100 * 2 / full_tokens + 1


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
