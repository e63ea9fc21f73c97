"""Quantized weights decoded once train as they do decoded at every pass."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.finetune.decoded_base import decode_base
from benchmarks.finetune.methods.adalora import QAdaLora
from benchmarks.finetune.methods.qlora import Qlora
from peft_autoqra import AutoQRAConfig, BitRankPlan, LayerPlan, MemoryModel
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant.backends import QUANTIZED_LAYERS
from tests.benchmarks.tiny_setting import TinySetting, tiny_setting
from tests.conftest import TinyLlamaFactory

QUANTIZED = (bnb.nn.Linear4bit, *QUANTIZED_LAYERS)
NATIVE, BNB = QuantizerSettings(group_size=32), QuantizerSettings(backend="bitsandbytes")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_llama: TinyLlamaFactory) -> TinySetting:
    return tiny_setting(tmp_path_factory.mktemp("decoded"), tiny_llama)


def step(model: nn.Module) -> dict[str, Tensor]:
    """Loss and gradients of one step as the trainer takes it."""
    tokens = torch.arange(48).reshape(4, 12)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


def check(model: PeftModel) -> None:
    """The same to the last bit, with every adapter at work."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    model.train()
    before = step(model)
    decode_base(model)
    assert not any(isinstance(module, QUANTIZED) for module in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before.keys() - {"loss"}
    after = step(model)
    assert len(before) > 1
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", [Qlora(rank=4), QAdaLora(initial_rank=6, rank=4)], ids=lambda method: method.name)
def test_rivals_on_nf4(method: Any, setting: TinySetting) -> None:
    check(method.prepare(setting, None, setting.recipe.sft_config(setting.folder)).model)


@pytest.mark.parametrize(
    ("quantizer", "bits"), [*((NATIVE, bits) for bits in (2, 3, 4, 8)), *((BNB, bits) for bits in (4, 8))]
)
def test_layers_of_this_package(quantizer: QuantizerSettings, bits: int, setting: TinySetting) -> None:
    base = setting.load_base()
    names = list(MemoryModel.from_model(base).modules)
    layers = {name: LayerPlan(bits, (4, 0)[index % 2]) for index, name in enumerate(names)}
    check(get_peft_model(base, AutoQRAConfig(plan=BitRankPlan(layers, quantizer=quantizer), task_type="CAUSAL_LM")))
