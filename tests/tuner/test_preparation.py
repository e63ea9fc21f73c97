"""Quantizing the base in place: what it makes, and that every error leaves the model as it was."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from peft_autoqra.errors import AutoQRAError, InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import Correction, PlanCalibration
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, layer_bits
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.tuner import targets
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.layer import QuantLoRALinear
from tests.conftest import TinyLlamaFactory
from tests.tuner.synthetic import (
    assert_unchanged,
    calibrated_plan,
    logits,
    mixed_plan,
    random_calibration,
    snapshot,
)

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def base_layer(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def adapter_ranks(model: nn.Module) -> dict[str, int]:
    return {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}


# ------------------------------------------------------------------------------------------------------ what it makes


def test_every_module_gets_the_bits_and_rank_of_its_plan(tiny_llama: TinyLlamaFactory) -> None:
    base = tiny_llama()
    plan = mixed_plan(base)
    model = get_peft_model(base, AutoQRAConfig(plan=plan)).get_base_model()
    assert {name: layer_bits(base_layer(model, name)) for name in plan} == {n: p.bits for n, p in plan.items()}
    assert adapter_ranks(model) == {name: layer.rank for name, layer in plan.items() if layer.rank}
    assert type(base_layer(model, "lm_head")) is nn.Linear


def test_the_default_is_4_bits_and_rank_8_on_all_linear_layers(tiny_llama: TinyLlamaFactory) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig()).get_base_model()
    assert len(adapter_ranks(model)) == 14
    assert {layer_bits(base_layer(model, name)) for name in adapter_ranks(model)} == {4}
    assert set(adapter_ranks(model).values()) == {8}


def test_patterns_take_precedence_over_bits(tiny_llama: TinyLlamaFactory) -> None:
    config = AutoQRAConfig(
        bits=3,
        r=4,
        target_modules=["q_proj", "v_proj"],
        bits_pattern={r"^model\.layers\.0\.self_attn\.q": 8, "up_proj": 2},
    )
    with pytest.raises(InvalidPlanError, match="match no module"):
        get_peft_model(tiny_llama(), config)
    config.bits_pattern = {r"^model\.layers\.0\.self_attn\.q_proj": 8, "up_proj": 2}
    model = get_peft_model(tiny_llama(), config).get_base_model()
    bits = {name: layer_bits(module) for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert {name.replace(".base_layer", ""): b for name, b in bits.items()} == {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.1.self_attn.q_proj": 3,
        "model.layers.0.self_attn.v_proj": 3,
        "model.layers.1.self_attn.v_proj": 3,
        "model.layers.0.mlp.up_proj": 2,
        "model.layers.1.mlp.up_proj": 2,
    }
    assert len(adapter_ranks(model)) == 4


def test_the_bitsandbytes_backend(tiny_llama: TinyLlamaFactory) -> None:
    config = AutoQRAConfig(bits=4, r=4, quant_backend="bitsandbytes", bits_pattern={"down_proj": 16, "o_proj": 8})
    model = get_peft_model(tiny_llama(), config)
    types = [type(base_layer(model.get_base_model(), name)) for name in adapter_ranks(model.get_base_model())]
    assert sorted(t.__name__ for t in types) == ["Int8Linear"] * 2 + ["Linear"] * 2 + ["NF4Linear"] * 10
    logits(model)  # an evaluation must not spoil the training that follows
    model.train()(
        input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)
    ).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_only_adapters_are_trained_and_codes_are_no_buffers(tiny_llama: TinyLlamaFactory) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(r=4))
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    assert not any("W_q" in name or "scale" in name for name, _ in model.named_buffers())


def test_calibration_changes_the_codes(tiny_llama: TinyLlamaFactory) -> None:
    plan = mixed_plan(tiny_llama())
    calibrated = plan.replace(calibration=random_calibration(tiny_llama(), plan))
    plain_model, calibrated_model = (
        get_peft_model(tiny_llama(), AutoQRAConfig(plan=p)).get_base_model() for p in (plan, calibrated)
    )
    changed = {
        name
        for name, layer in plan.items()
        if layer.bits < 16
        and not torch.equal(base_layer(plain_model, name).W_q, base_layer(calibrated_model, name).W_q)
    }
    assert changed == {name for name, layer in plan.items() if layer.bits < 8}  # 8 bits are symmetric


def test_a_compensated_plan_starts_at_its_corrections(tiny_llama: TinyLlamaFactory) -> None:
    plan = calibrated_plan(tiny_llama())
    assert plan.calibration is not None
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=plan)).get_base_model()
    for name, layer in plan.items():
        if not layer.rank:
            continue
        delta = model.get_submodule(name).get_delta_weight("default")
        if name in plan.calibration.corrections:
            correction = plan.calibration.corrections[name]
            expected = correction.left.astype(np.float32) @ correction.right.astype(np.float32)
            torch.testing.assert_close(delta, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
        else:
            assert not delta.any()


def test_a_compensated_plan_can_start_at_zero_all_the_same(tiny_llama: TinyLlamaFactory) -> None:
    plan = calibrated_plan(tiny_llama())
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=plan, init_lora_weights=True))
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def bitsandbytes_plan(base: nn.Module) -> BitRankPlan:
    """The mixed plan's ranks with the bits of the bitsandbytes backend."""
    plan = mixed_plan(base, quantizer=QuantizerSettings(backend="bitsandbytes"))
    return plan.replace(layers={n: LayerPlan((4, 8, 16)[i % 3], plan[n].rank) for i, n in enumerate(plan)})


@pytest.mark.parametrize("make_plan", [mixed_plan, bitsandbytes_plan])
def test_gradients_of_the_adapters_are_those_of_the_dequantized_model(
    tiny_llama: TinyLlamaFactory, make_plan: Callable[[nn.Module], BitRankPlan]
) -> None:
    """Independent reference: plain LoRA of PEFT on dense layers that hold the dequantized weights."""
    base = tiny_llama()
    plan = make_plan(base)
    torch.manual_seed(0)
    model = get_peft_model(base, AutoQRAConfig(plan=plan))
    dense = tiny_llama()
    for name in plan:
        layer = base_layer(model.get_base_model(), name)
        if isinstance(layer, QUANTIZED_LAYERS):
            dense.get_submodule(name).weight.data = layer.dequantize()
    ranks = {name: layer.rank for name, layer in plan.items() if layer.rank}
    patterns = {"rank_pattern": ranks, "alpha_pattern": {name: 8 * 16 / rank for name, rank in ranks.items()}}
    reference = get_peft_model(dense, LoraConfig(r=8, target_modules=list(ranks), use_rslora=True, **patterns))
    adapters = {name: parameter for name, parameter in reference.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
                adapters[name].copy_(parameter)
    tokens = torch.randint(128, (2, 10))
    losses = [m(input_ids=tokens, labels=tokens).loss for m in (model, reference)]
    assert losses[0] == losses[1]
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, adapters[name].grad), name


# ---------------------------------------------------------------------------------------------------------- bad input


def without_corrections(plan: BitRankPlan) -> BitRankPlan:
    assert plan.calibration is not None
    corrections = dict(plan.calibration.corrections)
    corrections.popitem()
    return plan.replace(
        calibration=PlanCalibration(
            input_second_moments=plan.calibration.input_second_moments, corrections=corrections
        )
    )


def with_correction(plan: BitRankPlan, name: str, left: tuple[int, int], right: tuple[int, int]) -> BitRankPlan:
    assert plan.calibration is not None
    bad = Correction(left=np.zeros(left, np.float16), right=np.zeros(right, np.float16))
    return plan.replace(
        calibration=PlanCalibration(
            input_second_moments=plan.calibration.input_second_moments,
            corrections={**plan.calibration.corrections, name: bad},
        )
    )


def with_moment(plan: BitRankPlan, name: str, moment: Any) -> BitRankPlan:
    assert plan.calibration is not None
    return plan.replace(
        calibration=PlanCalibration(
            input_second_moments={**plan.calibration.input_second_moments, name: moment},
            corrections=plan.calibration.corrections,
        )
    )


def last_quantized(plan: BitRankPlan) -> str:
    return [name for name, layer in plan.items() if layer.bits < 8][-1]


BAD_PLANS = {
    "unknown module": (
        lambda plan: plan.replace(layers={**plan, "model.layers.7.mlp.down_proj": LayerPlan(4, 4)}),
        r"'model\.layers\.7\.mlp\.down_proj'; close names of the model: \['model\.layers",
    ),
    "rank above the weight": (
        lambda plan: plan.replace(layers={**plan, Q_PROJ: LayerPlan(4, 65)}, shapes=None),
        r"rank 65 of 'model.layers.0.self_attn.q_proj' is above .*\(64, 64\).*at most 64",
    ),
    "shape of another model": (
        lambda plan: plan.replace(shapes={**plan.shapes, DOWN_PROJ: (64, 64)}),
        r"shape \(64, 64\) at 'model.layers.0.mlp.down_proj'.*\(64, 128\)",
    ),
    "fingerprint of another model": (
        lambda plan: plan.replace(base_model=BaseModelInfo(fingerprint="0" * 32)),
        "made for 00000000",
    ),
    "bits of another backend": (
        lambda plan: plan.replace(quantizer=QuantizerSettings(backend="bitsandbytes")),
        "bits=.*has 4 bits .NF4. and 8 bits .int8.",
    ),
    "missing correction": (without_corrections, "no correction of rank"),
    "correction of too low a rank": (
        lambda plan: with_correction(plan, Q_PROJ, (64, 1), (1, 64)),
        f"no correction of rank 4 for '{Q_PROJ}'",
    ),
    "correction of another shape": (lambda plan: with_correction(plan, Q_PROJ, (63, 4), (4, 64)), f"'{Q_PROJ}'"),
    "moments of another shape": (lambda plan: with_moment(plan, last_quantized(plan), np.ones(3, np.float32)), "3"),
    "moments that are not finite": (
        lambda plan: with_moment(
            plan, last_quantized(plan), np.full(plan.shapes[last_quantized(plan)][1], np.nan, np.float32)
        ),
        "finite",
    ),
    "an embedding": (
        lambda plan: plan.replace(layers={**plan, "model.embed_tokens": LayerPlan(4, 0)}),
        "'model.embed_tokens' is a Embedding",
    ),
    "a norm with an adapter": (
        lambda plan: plan.replace(layers={**plan, "model.norm": LayerPlan(16, 4)}),
        "'model.norm' is a LlamaRMSNorm",
    ),
    "a container": (
        lambda plan: plan.replace(layers={**plan, "model.layers.0.mlp": LayerPlan(4, 4)}),
        "'model.layers.0.mlp' is a LlamaMLP",
    ),
    "a container without adapter": (
        lambda plan: plan.replace(layers={**plan, "model.layers.0.mlp": LayerPlan(4, 0)}),
        "'model.layers.0.mlp' is a LlamaMLP",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_that_does_not_fit_leaves_the_model_unchanged(tiny_llama: TinyLlamaFactory, case: str) -> None:
    spoil, message = BAD_PLANS[case]
    model = tiny_llama()
    config = AutoQRAConfig(plan=spoil(calibrated_plan(tiny_llama())))
    before = snapshot(model)
    with pytest.raises(AutoQRAError, match=message):
        get_peft_model(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_projj"]}, r"q_projj"),
        ({"target_modules": ["q_projj"], "bits_pattern": {"v_proj": 3}}, r"q_projj"),
        ({"target_modules": ["q_proj", "v_projj"]}, r"v_projj"),
        ({"target_modules": r".*nothing"}, "nothing"),
        ({"bits_pattern": {"nothing": 3}}, r"bits_pattern keys \['nothing'\] match no module"),
        ({"r": 4, "rank_pattern": {"nothing": 3}}, r"rank_pattern keys \['nothing'\] match no module"),
        ({"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, "rank_pattern keys"),
        ({"r": 33}, r"rank 33 of 'model.layers.0.self_attn.k_proj' is above .*\(32, 64\)"),
        ({"r": 4, "rank_pattern": {"q_proj": 100}}, "rank 100 of 'model.layers.0.self_attn.q_proj'"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding"),
        ({"bits": 3, "quant_backend": "bitsandbytes"}, "bits=3 of 'model.layers.0.self_attn.q_proj'"),
        ({"base_fingerprint": "1" * 32}, "made for 1111"),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_unchanged(
    tiny_llama: TinyLlamaFactory, settings: dict[str, Any], message: str
) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    before = snapshot(model)
    with pytest.raises(AutoQRAError, match=message):
        get_peft_model(model, AutoQRAConfig(**settings))
    assert_unchanged(model, before)


def test_a_tied_weight_is_not_quantized(tiny_llama: TinyLlamaFactory) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = snapshot(model)
    config = AutoQRAConfig(plan={"lm_head": LayerPlan(4, 0), "model.layers.0.mlp.up_proj": LayerPlan(4, 4)})
    with pytest.raises(InvalidPlanError, match=r"'lm_head' cannot be quantized by itself: its weight is tied"):
        get_peft_model(model, copy.copy(config))
    assert_unchanged(model, before)
    get_peft_model(tiny_llama(tie_word_embeddings=False), config)


def test_weights_that_are_not_finite_are_named_and_left_alone(tiny_llama: TinyLlamaFactory) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    before = snapshot(model)
    with pytest.raises(InvalidPlanError, match=r"'model\.layers\.1\.mlp\.down_proj' holds NaN"):
        get_peft_model(model, AutoQRAConfig(bits=4, r=4))
    assert_unchanged(model, before)


def test_a_model_without_weights_is_refused(tiny_llama: TinyLlamaFactory) -> None:
    with pytest.raises(InvalidPlanError, match="on the meta device; load the model's weights first"):
        get_peft_model(tiny_llama().to("meta"), AutoQRAConfig(bits=4, r=4))


def test_an_input_size_without_groups_is_named(tiny_llama: TinyLlamaFactory) -> None:
    model = tiny_llama(intermediate_size=100)
    before = snapshot(model)
    with pytest.raises(InvalidPlanError, match=r"'model\.layers\.0\.mlp\.down_proj' has 100 input features"):
        get_peft_model(model, AutoQRAConfig(bits=4, r=4))
    assert_unchanged(model, before)
    get_peft_model(model, AutoQRAConfig(bits=4, r=4, bits_pattern={"down_proj": 16}))


def test_conv1d_of_gpt2_is_quantized_as_the_linear_layer_that_it_is() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    name = "transformer.h.0.attn.c_attn"
    conv1d = model.get_submodule(name)
    linear = nn.Linear(32, 96)
    linear.weight, linear.bias = nn.Parameter(conv1d.weight.detach().T.contiguous()), conv1d.bias
    get_peft_model(model, AutoQRAConfig(bits=3, r=4, target_modules=["c_attn"]))
    get_peft_model(wrapped := nn.Sequential(linear), AutoQRAConfig(bits=3, r=4, target_modules=["0"]))
    quantized, reference = model.get_submodule(name).base_layer, wrapped[0].base_layer
    assert torch.equal(quantized.W_q, reference.W_q)
    assert torch.equal(quantized.dequantize(), reference.dequantize())


def test_a_subclass_of_linear_is_refused_by_name() -> None:
    """It may compute anything."""
    model = nn.TransformerEncoderLayer(32, 2, 64)
    before = snapshot(model)
    with pytest.raises(InvalidPlanError, match=r"'self_attn.out_proj' is a NonDynamicallyQuantizableLinear"):
        get_peft_model(model, AutoQRAConfig(bits=4, r=4, target_modules=["out_proj", "linear1"]))
    assert_unchanged(model, before)


def test_layers_that_torch_passes_by_are_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64))
    before = snapshot(model)
    with pytest.raises(InvalidPlanError, match=r"'0.linear1' cannot be .*TransformerEncoderLayer reads the weights"):
        get_peft_model(model, AutoQRAConfig(bits=4, r=4, target_modules=["linear1", "linear2"]))
    assert_unchanged(model, before)


def test_a_plan_for_other_weights_is_refused_unless_the_fingerprint_is_taken_off(tiny_llama: TinyLlamaFactory) -> None:
    plan, other = mixed_plan(tiny_llama(seed=0)), tiny_llama(seed=1)
    before = snapshot(other)
    with pytest.raises(PlanMismatchError, match=r"base_fingerprint=None"):
        get_peft_model(other, AutoQRAConfig(plan=plan))
    assert_unchanged(other, before)
    get_peft_model(other, AutoQRAConfig(plan=plan.replace(base_model=BaseModelInfo())))


def test_the_same_values_in_another_dtype_have_the_same_fingerprint(tiny_llama: TinyLlamaFactory) -> None:
    narrow = tiny_llama().bfloat16()
    plan = mixed_plan(narrow)
    get_peft_model(narrow.float(), AutoQRAConfig(plan=plan))


def test_what_was_swapped_is_what_the_plan_says(tiny_llama: TinyLlamaFactory) -> None:
    base = tiny_llama()
    config = AutoQRAConfig(bits=3, r=4, bits_pattern={"down_proj": 8})
    model = get_peft_model(base, config).get_base_model()
    plan = config.plan
    assert {name: layer.bits for name, layer in plan.items()} == {
        name: 8 if name.endswith("down_proj") else 3 for name in adapter_ranks(model)
    }
    assert all(isinstance(model.get_submodule(name), QuantLoRALinear) for name in plan)
    assert plan.shapes[DOWN_PROJ] == (64, 128)
    assert plan.base_model.fingerprint == mixed_plan(tiny_llama()).base_model.fingerprint


def test_no_pattern_of_a_plan_is_tried_on_other_modules(
    tiny_llama: TinyLlamaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All on all takes minutes for hundreds of modules: re keeps 512 compiled patterns."""
    tried: list[str] = []
    monkeypatch.setattr(targets, "get_pattern_key", lambda keys, name: tried.extend(keys) or name)
    get_peft_model(tiny_llama(), AutoQRAConfig(plan=mixed_plan(tiny_llama())))
    assert tried == []


@pytest.mark.parametrize(("bits", "kind"), [(4, NF4Linear), (8, Int8Linear)])
def test_bitsandbytes_layers_are_recognized_as_quantized(
    tiny_llama: TinyLlamaFactory, bits: int, kind: type[nn.Module]
) -> None:
    config = AutoQRAConfig(bits=bits, r=4, quant_backend="bitsandbytes")
    model = get_peft_model(tiny_llama(), config).get_base_model()
    assert isinstance(base_layer(model, Q_PROJ), kind)


@pytest.mark.parametrize("shorthand", ["all-linear", "All-Linear"])
def test_experts_are_not_left_out_however_the_shorthand_is_written(shorthand: str) -> None:
    model = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=64, num_local_experts=2,
        )
    )  # fmt: skip
    before = snapshot(model)
    with pytest.raises(InvalidPlanError, match="experts in fused parameters"):
        get_peft_model(model, AutoQRAConfig(bits=4, r=4, target_modules=shorthand))
    assert_unchanged(model, before)
