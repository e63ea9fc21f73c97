"""The resident dense weights against the layers that the plan really gives."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from peft_autoqra import AutoQRAConfig, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.importance.calibration_bank import BankSettings, build_calibration_bank
from peft_autoqra.importance.module_fit import FitSettings
from peft_autoqra.quant.backends import QUANTIZED_LAYERS
from peft_autoqra.target_modules import linear_targets
from tests.tiny_data import token_dataset

BITS, RANKS = (2, 3, 4, 8, 16), (4, 0, 2)
QUANTIZER = QuantizerSettings(group_size=32)
BNB = QuantizerSettings(backend="bitsandbytes")


@pytest.fixture(scope="module")
def bank(tiny_llama):
    model = tiny_llama()
    batches = [{"input_ids": torch.tensor(token_dataset(seed=0, num_sequences=4)["input_ids"])}]
    names = list(linear_targets(model))
    settings = BankSettings(
        module_names=tuple(names), bit_choices=BITS[:-1], quantizer=QUANTIZER, fit=FitSettings(max_rank=4)
    )
    return build_calibration_bank(model, batches, settings)


@pytest.fixture
def resident(tiny_llama, bank) -> ResidentModel:
    model = tiny_llama()
    return ResidentModel(model, linear_targets(model), bank)


def mixed_plan(bank, names, shift: int = 0) -> BitRankPlan:
    """All bit-widths with and without an adapter, calibrated as a search's plans are."""
    layers = {n: LayerPlan(BITS[(i + shift) % 5], RANKS[(i + shift) % 3]) for i, n in enumerate(names)}
    return BitRankPlan(layers, quantizer=QUANTIZER, initialization="compensate", calibration=bank.for_layers(layers))


def bitsandbytes_plan(names) -> BitRankPlan:
    return BitRankPlan({n: LayerPlan((4, 8, 16)[i % 3], 2) for i, n in enumerate(names)}, quantizer=BNB)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in linear_targets(model).items()}


def decoded_weights(model, plan: BitRankPlan, *, with_corrections: bool) -> dict[str, torch.Tensor]:
    """What the layers of the quantized PEFT model compute with: decoded weight, and adapters where asked for."""
    config = AutoQRAConfig(plan=plan, lora_alpha=8, task_type="CAUSAL_LM")
    base = get_peft_model(model, config).get_base_model()
    found = {}
    for name in plan:
        module = base.get_submodule(name)
        layer = getattr(module, "base_layer", module)
        dense = layer.dequantize(torch.float32) if isinstance(layer, QUANTIZED_LAYERS) else layer.weight.detach()
        if with_corrections and plan[name].rank:
            dense = dense + module.get_delta_weight("default").detach()
        found[name] = dense
    return found


def test_native_weights_are_those_of_the_quantized_layers(resident, bank, tiny_llama):
    plan = mixed_plan(bank, weights(resident.model))
    resident.load(plan, with_corrections=False)
    expected = decoded_weights(tiny_llama(), plan, with_corrections=False)
    for name, weight in weights(resident.model).items():
        assert torch.equal(weight, expected[name]), name


def test_bitsandbytes_weights_are_those_of_the_quantized_layers(resident, tiny_llama):
    plan = bitsandbytes_plan(weights(resident.model))
    resident.load(plan, with_corrections=True)  # these plans start at zero
    expected = decoded_weights(tiny_llama(), plan, with_corrections=False)
    for name, weight in weights(resident.model).items():
        assert torch.equal(weight, expected[name]), name


def test_corrections_are_what_the_adapters_start_with(resident, bank, tiny_llama):
    plan = mixed_plan(bank, weights(resident.model))
    resident.load(plan, with_corrections=False)
    quantized = weights(resident.model)
    resident.load(plan, with_corrections=True)
    corrected = weights(resident.model)
    real = decoded_weights(tiny_llama(), plan, with_corrections=True)
    for name, layer in plan.items():
        expected = quantized[name]
        if layer.bits < 16 and layer.rank:
            correction = plan.calibration.corrections[name]
            left, right = (torch.from_numpy(side).float() for side in (correction.left, correction.right))
            expected = expected + left @ right
            assert not torch.equal(corrected[name], quantized[name])
        assert torch.allclose(corrected[name], expected, atol=1e-7), name
        assert torch.allclose(corrected[name], real[name], atol=1e-5), name


def test_restore_is_exact(resident, bank):
    before = {name: tensor.clone() for name, tensor in resident.model.state_dict().items()}
    resident.load(mixed_plan(bank, weights(resident.model)), with_corrections=True)
    resident.restore()
    for name, tensor in resident.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_was_loaded_before_leaves_no_trace(resident, bank, tiny_llama):
    names = list(weights(resident.model))
    plans = [mixed_plan(bank, names), bitsandbytes_plan(names), mixed_plan(bank, names, shift=1)]
    order = [(0, True), (1, False), (0, False), (2, True), (0, True), (0, False), (2, False), (1, True)]
    for index, with_corrections in order:
        resident.load(plans[index], with_corrections=with_corrections)
        fresh = tiny_llama()
        ResidentModel(fresh, linear_targets(fresh), bank).load(plans[index], with_corrections=with_corrections)
        for name, weight in weights(fresh).items():
            assert torch.equal(resident.model.get_submodule(name).weight, weight), (index, with_corrections, name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_transposed_layers_of_gpt2():
    def make():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()

    model = make()
    names = list(linear_targets(model))
    settings = BankSettings(
        module_names=tuple(names), bit_choices=BITS[:-1], quantizer=QUANTIZER, fit=FitSettings(max_rank=4)
    )
    tokens = torch.arange(24).view(2, 12)
    bank = build_calibration_bank(model, [{"input_ids": tokens}], settings)
    plan, expected = mixed_plan(bank, names), model(tokens).logits
    quantized = get_peft_model(make(), AutoQRAConfig(plan=plan, lora_alpha=8, task_type="CAUSAL_LM")).eval()
    resident = ResidentModel(model, linear_targets(model), bank)
    resident.load(plan, with_corrections=True)
    torch.testing.assert_close(model(tokens).logits, quantized(tokens).logits, atol=1e-4, rtol=1e-4)
    resident.restore()
    assert torch.equal(model(tokens).logits, expected)
