"""What PEFT offers for LoRA, on a mixed-bit base: several adapters, switching, merging, unloading."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, NativeBackend, layer_bits
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.layer import QuantLoRALinear
from tests.conftest import TinyLlamaFactory
from tests.tuner.synthetic import (
    assert_unchanged,
    calibrated_plan,
    logits,
    mixed_plan,
    random_calibration,
    randomize_adapters,
    snapshot,
)


def mixed_model(make: TinyLlamaFactory, dtype: torch.dtype = torch.float32) -> PeftModel:
    base = make().to(dtype)
    model = get_peft_model(base, AutoQRAConfig(plan=mixed_plan(base)))
    randomize_adapters(model)
    return model


def bitsandbytes_model(make: TinyLlamaFactory, dtype: torch.dtype = torch.float32) -> PeftModel:
    pattern = {"o_proj": 16, "q_proj": 8, "down_proj": 8}
    config = AutoQRAConfig(bits=4, r=4, quant_backend="bitsandbytes", bits_pattern=pattern)
    model = get_peft_model(make().to(dtype), config)
    randomize_adapters(model)
    return model


MakeModel = Callable[..., PeftModel]
MODELS = [mixed_model, bitsandbytes_model]


def dense_reference(make: TinyLlamaFactory, model: PeftModel) -> nn.Module:
    """A plain model whose weights are the dequantized ones plus the adapters, added up in float64."""
    dense = make().float()
    for name, module in model.get_base_model().named_modules():
        layer = module.get_base_layer() if hasattr(module, "lora_A") else module
        if name.endswith("base_layer") or not isinstance(layer, (nn.Linear, *QUANTIZED_LAYERS)) or "lora_" in name:
            continue
        weight = layer.dequantize() if isinstance(layer, QUANTIZED_LAYERS) else layer.weight
        weight = weight.detach().double()
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            weight = weight + module.scaling["default"] * b.double() @ a.double()
        dense.get_submodule(name).weight.data = weight.float()
    return dense


# --------------------------------------------------------------------------------------------------- on, off, merged


@pytest.mark.parametrize("make_model", MODELS)
def test_disable_adapter_gives_the_quantized_base(tiny_llama: TinyLlamaFactory, make_model: MakeModel) -> None:
    model = make_model(tiny_llama)
    with_adapter = logits(model)
    with model.disable_adapter():
        without = logits(model)
    assert torch.equal(logits(model), with_adapter)
    assert not torch.allclose(without, with_adapter)
    assert torch.equal(without, logits(model.unload()))


@pytest.mark.parametrize("make_model", MODELS)
def test_merging_loses_nothing_and_unmerging_is_exact(tiny_llama: TinyLlamaFactory, make_model: MakeModel) -> None:
    model = make_model(tiny_llama)
    unmerged, before = logits(model), snapshot(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(dense_reference(tiny_llama, make_model(tiny_llama))))
    model.unmerge_adapter()
    for key in ("types", "tensors"):  # a merged layer 16 bits wide is computed back by PEFT, not restored
        assert snapshot(model)[key].keys() == before[key].keys()
    assert all(
        torch.equal(tensor, before["tensors"][name])
        for name, tensor in snapshot(model)["tensors"].items()
        if "weight" not in name or "lora_" in name
    )
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-5, atol=1e-6)


def test_unmerging_quantized_layers_gives_equal_logits(tiny_llama: TinyLlamaFactory) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=3, r=4))
    randomize_adapters(model)
    unmerged, before = logits(model), snapshot(model)
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        model.unmerge_adapter()
        assert torch.equal(logits(model), unmerged)
        assert_unchanged(model, before)


def test_disabling_while_merged(tiny_llama: TinyLlamaFactory) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=3, r=4))
    randomize_adapters(model)
    with model.disable_adapter():
        without = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), without)


def test_a_broken_adapter_is_not_merged(tiny_llama: TinyLlamaFactory) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=3, r=4, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.fill_(torch.nan)
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_model", MODELS)
def test_merge_and_unload_gives_a_plain_model_that_saves_and_loads(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, make_model: MakeModel, dtype: torch.dtype
) -> None:
    merged = make_model(tiny_llama, dtype).merge_and_unload()
    assert {name: type(m) for name, m in merged.named_modules()} == {
        name: type(m) for name, m in tiny_llama().named_modules()
    }
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    if dtype == torch.float32:
        reference = dense_reference(tiny_llama, make_model(tiny_llama))
        torch.testing.assert_close(logits(merged), logits(reference), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert loaded.keys() == merged.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("make_model", MODELS)
def test_merging_after_the_dtype_was_changed(tiny_llama: TinyLlamaFactory, make_model: MakeModel) -> None:
    model = make_model(tiny_llama).to(torch.bfloat16)
    unmerged = logits(model)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(merged), unmerged, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_quantized_base_back(tiny_llama: TinyLlamaFactory, merged: bool) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=3, r=4))
    randomize_adapters(model)
    with model.disable_adapter():
        expected = logits(model)
    if merged:
        model.merge_adapter()
    base = model.unload()
    assert torch.equal(logits(base), expected)
    assert not any(hasattr(module, "lora_A") for module in base.modules())
    assert layer_bits(base.model.layers[0].mlp.up_proj) == 3


def test_a_quantized_base_takes_an_adapter_again(tiny_llama: TinyLlamaFactory) -> None:
    plan = mixed_plan(tiny_llama())
    base = get_peft_model(tiny_llama(), AutoQRAConfig(plan=plan)).unload()
    model = get_peft_model(base, AutoQRAConfig(plan=plan))
    randomize_adapters(model)
    assert torch.equal(logits(model), logits(mixed_model(tiny_llama)))


@pytest.mark.parametrize("make_model", MODELS)
def test_a_deep_copy_computes_the_same_and_is_independent(tiny_llama: TinyLlamaFactory, make_model: MakeModel) -> None:
    model = make_model(tiny_llama)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    randomize_adapters(twin, seed=1)
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT and transformers
@pytest.mark.parametrize("make_model", MODELS)
def test_gradient_checkpointing_gives_identical_gradients(tiny_llama: TinyLlamaFactory, make_model: MakeModel) -> None:
    tokens = torch.randint(128, (2, 10))
    gradients = []
    for checkpointing in (False, True):
        model = make_model(tiny_llama).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert gradients[0]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(("backend", "bits"), [("native", 4), ("bitsandbytes", 8)])
def test_dora_works_on_quantized_layers(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, backend: Literal["native", "bitsandbytes"], bits: int
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = AutoQRAConfig(bits=bits, r=4, quant_backend=backend, use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with model.disable_adapter():
        without = logits(model)
    torch.testing.assert_close(logits(model), without, rtol=1e-4, atol=1e-5)  # starts as the base
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


# -------------------------------------------------------------------------------------------------- further adapters


def test_a_plain_lora_adapter_beside_ours(tiny_llama: TinyLlamaFactory) -> None:
    model = mixed_model(tiny_llama)
    first = logits(model)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("plain")
    with model.disable_adapter():
        quantized = logits(model)
    assert torch.equal(logits(model), quantized)  # starts at zero
    randomize_adapters(model, adapter_name="plain")
    assert not torch.allclose(logits(model), quantized)
    model.set_adapter("default")
    model.delete_adapter("plain")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("bits", [4, 3])
def test_a_second_adapter_with_the_same_bits(tiny_llama: TinyLlamaFactory, bits: int) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=bits, r=4))
    randomize_adapters(model)
    first = logits(model)
    model.add_adapter("second", AutoQRAConfig(bits=bits, r=2))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_a_second_adapter_of_the_same_plan_with_other_ranks(tiny_llama: TinyLlamaFactory) -> None:
    model = mixed_model(tiny_llama)
    plan = mixed_plan(tiny_llama())
    model.add_adapter("second", AutoQRAConfig(plan=plan))
    model.set_adapter("second")
    assert {
        name: module.r["second"]
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    } == {name: layer.rank for name, layer in plan.items() if layer.rank}


def calibrated_model(make: TinyLlamaFactory) -> PeftModel:
    return get_peft_model(make(), AutoQRAConfig(plan=calibrated_plan(make())))


def other_calibration(make: TinyLlamaFactory) -> AutoQRAConfig:
    plan = calibrated_plan(make())
    moments = {name: 2 * moment for name, moment in random_calibration(make(), plan).input_second_moments.items()}
    return AutoQRAConfig(
        plan=plan.replace(calibration=type(plan.calibration)(input_second_moments=moments), initialization="zero")
    )


def uniform_model(make: TinyLlamaFactory, **settings: Any) -> PeftModel:
    return get_peft_model(make(), AutoQRAConfig(**({"bits": 4, "r": 4} | settings)))


CONFLICTS: dict[str, tuple[Callable[[TinyLlamaFactory], PeftModel], Callable[[TinyLlamaFactory], Any], str]] = {
    "other bits": (uniform_model, lambda _: AutoQRAConfig(bits=3, r=4), "quantized to 4 bits already.*wants: 3 bits"),
    "16 bits": (uniform_model, lambda _: AutoQRAConfig(bits=16, r=4), "quantized to 4 bits already.*wants: 16 bits"),
    "other bits of one module": (
        uniform_model,
        lambda _: AutoQRAConfig(bits=4, r=4, bits_pattern={r"^model\.layers\.1\.mlp\.down_proj": 2}),
        r"'model\.layers\.1\.mlp\.down_proj' is quantized to 4 bits already",
    ),
    "other group size": (uniform_model, lambda _: AutoQRAConfig(bits=4, r=4, group_size=16), "group"),
    "other backend": (
        uniform_model,
        lambda _: AutoQRAConfig(bits=4, r=4, quant_backend="bitsandbytes"),
        "wants.*bitsandbytes",
    ),
    "calibrated on uncalibrated": (
        mixed_model,
        lambda make: AutoQRAConfig(plan=calibrated_plan(make())),
        "calibration",
    ),
    "uncalibrated on calibrated": (
        calibrated_model,
        lambda make: AutoQRAConfig(plan=mixed_plan(make())),
        "calibration",
    ),
    "other calibration": (calibrated_model, other_calibration, "calibration"),
    "quantizing under a plain adapter": (
        lambda make: get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj"])),
        lambda _: AutoQRAConfig(bits=4, r=4),
        "has adapters already",
    ),
    "quantizing more modules": (
        lambda make: uniform_model(make, target_modules=["q_proj"]),
        lambda _: AutoQRAConfig(bits=4, r=4),
        "has adapters already",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_an_adapter_for_another_base_is_refused_and_nothing_changed(tiny_llama: TinyLlamaFactory, case: str) -> None:
    make_model, make_config, message = CONFLICTS[case]
    model = make_model(tiny_llama)
    before, expected = snapshot(model), logits(model)
    with pytest.raises(InvalidPlanError, match=message):
        model.add_adapter("second", make_config(tiny_llama))
    assert_unchanged(model.eval(), before)
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]


def test_another_calibration_is_noticed_after_unloading_too(tiny_llama: TinyLlamaFactory) -> None:
    base = calibrated_model(tiny_llama).unload()
    with pytest.raises(InvalidPlanError, match="without calibration"):
        get_peft_model(base, AutoQRAConfig(plan=mixed_plan(tiny_llama())))
    get_peft_model(base, AutoQRAConfig(plan=calibrated_plan(tiny_llama())))


def test_adapters_of_another_base_are_noticed(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(seed=1), AutoQRAConfig(bits=4, r=4)).save_pretrained(tmp_path)
    model = uniform_model(tiny_llama)
    model.add_adapter("same", AutoQRAConfig(bits=4, r=2))
    assert model.peft_config["same"].base_fingerprint == model.peft_config["default"].base_fingerprint
    with pytest.raises(PlanMismatchError, match="was made for"):
        model.load_adapter(tmp_path, "other")


def test_the_adapter_lies_where_the_quantized_layer_lies() -> None:
    layer = NativeBackend(QuantizerSettings(group_size=32)).quantize(nn.Linear(64, 32), 4, None, "layer").to("meta")
    adapted = QuantLoRALinear(layer, "default", config=LoraConfig(r=4), r=4, lora_alpha=4)
    assert adapted.lora_A["default"].weight.device == adapted.lora_B["default"].weight.device == torch.device("meta")


def test_a_second_adapter_for_some_of_the_modules_reloads_on_its_own(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    model = uniform_model(tiny_llama)
    model.add_adapter("second", AutoQRAConfig(bits=4, r=2, target_modules=["q_proj"]))
    randomize_adapters(model)
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
    assert torch.equal(logits(loaded), logits(model))


def test_loading_a_second_adapter_from_disk(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = calibrated_model(tiny_llama)
    randomize_adapters(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    model.load_adapter(tmp_path, "second")
    randomize_adapters(calibrated_model(tiny_llama))
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd"])
def test_weighted_combination_of_adapters(tiny_llama: TinyLlamaFactory, tmp_path: Path, combination_type: str) -> None:
    plan = mixed_plan(tiny_llama())
    plan = plan.replace(layers={name: type(layer)(layer.bits, 4 if layer.rank else 0) for name, layer in plan.items()})
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=plan))
    model.add_adapter("second", AutoQRAConfig(plan=plan))
    randomize_adapters(model)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type=combination_type)
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    assert torch.equal(logits(loaded), logits(model))
    if combination_type == "cat":
        deltas = [logits_of(model, name) for name in ("default", "second", "both")]
        assert all(delta is not None for delta in deltas)


def logits_of(model: PeftModel, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    return logits(model)


def test_plain_lora_beside_the_package_is_plain_lora(tiny_llama: TinyLlamaFactory) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    randomize_adapters(model)
    expected = tiny_llama()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            assert type(module).__module__ == "peft.tuners.lora.layer"
            expected.get_submodule(name).weight.data += module.get_delta_weight("default")
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-5)
    assert type(model.merge_and_unload().model.layers[0].mlp.up_proj) is nn.Linear
