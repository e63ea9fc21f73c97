"""Configurations of the fine-tuning benchmark: what they name exists, and their budgets can be kept."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.finetune import config as config_module
from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.config import Config, read_config
from benchmarks.finetune.grid import group_cells
from benchmarks.finetune.methods.registry import METHODS
from benchmarks.finetune.tasks import TASKS
from peft_autoqra import MemoryModel
from peft_autoqra.plan import DENSE_BITS, QuantizerSettings

LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
ARCHITECTURES: dict[str, tuple[PretrainedConfig, int]] = {
    "SmolLM2-135M-Instruct": (
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
        134_515_008,
    ),
    "meta-llama/Llama-3.2-1B": (
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **LLAMA_3
        ),
        1_235_814_400,
    ),
    "meta-llama/Llama-3.1-8B": (
        LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **LLAMA_3),
        8_030_261_248,
    ),
    "Qwen/Qwen2.5-7B": (
        Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
        7_615_616_512,
    ),
}
"""Shapes as the models' own config.json has them, and the parameters that their cards state."""

FOLDER = Path(config_module.__file__).parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
LARGE = [FOLDER / f"{name}.yaml" for name in ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b")]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def config(request) -> Config:
    return read_config(request.param)


def memory_model_of(model: str) -> MemoryModel:
    shapes, num_parameters = ARCHITECTURES[model]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    return MemoryModel.from_model(model)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_recipes_for_large_models_are_there(path):
    config = read_config(path)
    assert set(config.tasks) == {"gsm8k", "metamath", "alpaca"}
    assert len(set(config.learning_rates)) >= 3


def test_tasks_and_methods_exist(config):
    assert set(config.tasks) <= TASKS.keys()
    for group in config.groups:
        assert set(group.methods) <= METHODS.keys()
        assert set(group.tasks or ()) <= set(config.tasks)
        assert any(METHODS[name].needs_budget for name in group.methods) == bool(group.budgets)


def test_budgets_can_be_kept_and_limit_something(config):
    memory_model = memory_model_of(config.model)
    native = QuantizerSettings()
    smallest = memory_model.estimate(memory_model.uniform(2, 1), native)
    largest = memory_model.estimate(memory_model.uniform(DENSE_BITS, 16), native)
    for budget in {budget for group in config.groups for budget in group.budgets}:
        limit = limit_of(budget, memory_model)
        assert smallest.in_scope(limit.scope) < limit.limit_bytes < largest.in_scope(limit.scope), budget


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B"])
def test_three_quarters_of_qlora_are_less_than_qlora_with_fewer_bits(model):
    """As the comments of the recipes for large models say."""
    memory_model = memory_model_of(model)
    budgets = ("0.75*qlora-4bit-r16", "qlora-2.5bit-r16", "qlora-3bit-r16", "qlora-4bit-r16")
    limits = [limit_of(budget, memory_model).limit_bytes for budget in budgets]
    assert limits == sorted(limits)
    assert limits[3] - limits[2] == pytest.approx(memory_model.num_weights / 8, abs=1)


@pytest.mark.parametrize("path", [*LARGE, FOLDER / "smollm2-135m.yaml"], ids=lambda path: path.stem)
def test_comments_tell_how_many_runs_there_are(path):
    """Learning rates are tried with the first seed; the best one is run with the others."""
    config, told = read_config(path), re.search(r"^# (\d+) runs\.", path.read_text("utf-8"), re.MULTILINE)
    assert told is not None
    seeds = defaultdict(set)
    for group in config.groups:
        for cell in group_cells(config, group, METHODS):
            assert group.seeds[0] == config.groups[0].seeds[0]  # that learning rates are tried with
            seeds[cell] |= set(group.seeds)
    assert int(told[1]) == sum(len(config.learning_rates) + len(found) - 1 for found in seeds.values())
