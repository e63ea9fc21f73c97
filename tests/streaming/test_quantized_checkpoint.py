"""A quantized model is saved as it is, and read again without quantizing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from peft_autoqra import AutoQRAQuantConfig, BitRankPlan, LayerPlan, QuantizerSettings, calibrate_plan
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.quant import native_backend
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.target_modules import linear_targets
from tests.conftest import TinyLlamaFactory
from tests.streaming.bases import adapt, assert_same_codes, codes, load_dense, load_streaming, save_base
from tests.tuner.synthetic import calibrated_plan, logits, randomize_adapters

NAME = "model.layers.0.mlp.up_proj"


def save_quantized(
    make: TinyLlamaFactory, tmp_path: Path, dtype: torch.dtype = torch.float32, shard_size: str = "1GB"
) -> tuple[nn.Module, BitRankPlan, Path]:
    """A calibrated model with every bit-width, and the folder it is saved in."""
    folder = save_base(make, tmp_path, attention_bias=True)
    plan = calibrated_plan(load_dense(folder, dtype))
    model = load_streaming(folder, AutoQRAQuantConfig(plan=plan), dtype)
    model.save_pretrained(tmp_path / "quantized", max_shard_size=shard_size)
    return model, plan, tmp_path / "quantized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_it_reloads_to_the_same_codes_without_quantizing(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shard_size: str
) -> None:
    model, _, folder = save_quantized(tiny_llama, tmp_path, dtype, shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    monkeypatch.setattr(native_backend, "quantize_affine", lambda *_, **__: pytest.fail("quantized"))
    again = load_dense(folder, dtype)
    assert_same_codes(model, again)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config == model.config.quantization_config
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            twin = again.get_submodule(name)
            assert (twin.weight_format, twin.compute_dtype) == (layer.weight_format, layer.compute_dtype)
            assert twin.calibration_digest == layer.calibration_digest is not None
            assert not twin.W_q.requires_grad
            assert twin.bias is None or twin.bias.requires_grad == layer.bias.requires_grad


def test_it_is_an_ordinary_checkpoint_and_small(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, plan, folder = save_quantized(tiny_llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "autoqra"
    assert config["base_fingerprint"] == plan.base_model.fingerprint
    assert {n: (m["bits"], tuple(m["shape"])) for n, m in config["modules"].items()} == {
        name: (layer.bits, plan.shapes[name]) for name, layer in plan.items()
    }
    tensors = load_file(folder / "model.safetensors")
    assert codes(model).keys() <= tensors.keys()
    assert "plan" not in config


def test_it_is_saved_again_to_the_same(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, _, folder = save_quantized(tiny_llama, tmp_path)
    load_dense(folder).save_pretrained(tmp_path / "again")
    assert_same_codes(model, load_dense(tmp_path / "again"))
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def test_adapters_fit_as_on_a_model_quantized_in_place(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, plan, folder = save_quantized(tiny_llama, tmp_path)
    expected = adapt(load_dense(tmp_path / "base"), plan=plan)
    model = adapt(load_dense(folder), plan=plan)
    assert torch.equal(logits(model), logits(expected))
    assert model.peft_config["default"].base_fingerprint == plan.base_model.fingerprint
    with pytest.raises(InvalidPlanError, match="already"):
        adapt(load_dense(folder), plan=plan.replace(calibration=None, initialization="zero"))


def test_an_adapter_names_it_as_its_base(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, plan, folder = save_quantized(tiny_llama, tmp_path)
    model = adapt(load_dense(folder), plan=plan)
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder
    )
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert_same_codes(model, again)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_transformers), logits(model))
    loaded = load_dense(folder)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "adapter-again")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter-again")), logits(model))


def test_without_its_adapters_a_model_can_be_saved(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, plan, folder = save_quantized(tiny_llama, tmp_path)
    expected = logits(model)
    adapted = adapt(load_dense(folder), plan=plan)
    with pytest.raises(InvalidPlanError, match=r"unload\(\)"):
        adapted.get_base_model().save_pretrained(tmp_path / "no")
    adapted.unload().save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_dense(tmp_path / "again")), expected)


def test_a_plan_beside_a_quantized_checkpoint_is_ignored_with_a_warning(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    model, _, folder = save_quantized(tiny_llama, tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = load_streaming(folder, AutoQRAQuantConfig(bits=8))
    assert_same_codes(model, again)


# ------------------------------------------------------------------------------------------------- fused in the file
@pytest.fixture
def fused_base(tmp_path: Path) -> Path:
    """A model whose query, key, value and gate weights are one tensor in its file."""
    if "hrm_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know the architecture")
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16}
    settings |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("hrm_text", pad_token_id=0, **settings))
    model.save_pretrained(tmp_path / "base")
    assert any("gqkv" in name or "qkv" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    return tmp_path / "base"


def test_fused_weights_are_quantized_apart(fused_base: Path, tmp_path: Path) -> None:
    expected = adapt(load_dense(fused_base), bits=3, r=1).unload()
    model = load_streaming(fused_base, AutoQRAQuantConfig(bits=3))
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load_dense(tmp_path / "quantized")), logits(expected))


def test_half_quantized_fused_weights_are_not_saved(fused_base: Path, tmp_path: Path) -> None:
    model = load_streaming(fused_base, AutoQRAQuantConfig(bits=3, bits_pattern={"k_proj": 16}))
    with pytest.raises(InvalidPlanError, match="one tensor with"):
        model.save_pretrained(tmp_path / "quantized")
    with pytest.raises(InvalidPlanError, match="puts together"):  # gate comes first, and decides for all
        load_streaming(fused_base, AutoQRAQuantConfig(bits=3, bits_pattern={r"self_attn\.gate_proj": 16}))


# ------------------------------------------------------------------------------------------------------------- damaged
def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_damaged_configurations_are_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, _, folder = save_quantized(tiny_llama, tmp_path)
    good: dict[str, Any] = {"bits": 3, "shape": [128, 64], "group_size": 32, "calibration_digest": None}
    dense = {"bits": 16, "shape": [128, 64]}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"modules": {}}, InvalidPlanError, "lists no modules"),
        ({"modules": {"nowhere": good}}, PlanMismatchError, "'nowhere' is a linear layer .* nothing there"),
        ({"modules": {"nowhere": dense}}, PlanMismatchError, "'nowhere' is a linear layer .* nothing there"),
        ({"modules": {NAME: good, "model.norm": dense}}, PlanMismatchError, "model has LlamaRMSNorm there"),
        ({"modules": {NAME: good, "": dense}}, InvalidPlanError, "names the module ''"),
        ({"modules": {NAME: dense | {"shape": [4, 4]}}}, PlanMismatchError, r"has Linear of shape \(128, 64\) there"),
        ({"modules": {NAME: good | {"shape": [4, 4]}}}, PlanMismatchError, "shape"),
        ({"modules": {NAME: good | {"group_size": 48}}}, InvalidPlanError, "group_size=48"),
        ({"modules": {NAME: good | {"group_size": None}}}, InvalidPlanError, "group size None"),
        ({"modules": {NAME: good | {"bits": 5}}}, InvalidPlanError, "bits=5"),
        ({"modules": {NAME: {"bits": 3}}}, InvalidPlanError, "damaged"),
        ({"autoqra_version": 99}, InvalidPlanError, "upgrade"),
    ]
    original = (folder / "config.json").read_text()
    for changes, error, match in cases:
        (folder / "config.json").write_text(original)
        edit_config(folder, **changes)
        with pytest.raises(error, match=match):
            load_dense(folder)


def test_missing_codes_are_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, plan, folder = save_quantized(tiny_llama, tmp_path)
    name = next(name for name, layer in plan.items() if layer.bits == 3)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{name}.scale_base"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidPlanError, match=f"lacks tensors of '{name}'"):
        load_dense(folder)


def test_the_record_of_a_model_does_not_quantize_another(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, _, _ = save_quantized(tiny_llama, tmp_path)
    with pytest.raises(InvalidPlanError, match="describes a model that is quantized already"):
        load_streaming(tmp_path / "base", model.config.quantization_config)


def test_int8_layers_are_saved_and_read_again(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    config = AutoQRAQuantConfig(bits=8, quant_backend="bitsandbytes")
    model = load_streaming(save_base(tiny_llama, tmp_path, attention_bias=True), config, torch.bfloat16)
    assert isinstance(model.get_submodule(NAME), Int8Linear)
    model.save_pretrained(tmp_path / "quantized")
    again = load_dense(tmp_path / "quantized", torch.bfloat16)
    assert_same_codes(model, again)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("saved", "loaded"), [(AutoModelForCausalLM, AutoModel), (AutoModel, AutoModelForCausalLM)])
@pytest.mark.filterwarnings("ignore")  # of a head that has no weights, or has no place
def test_a_class_with_or_without_its_head_reads_it(tiny_llama, tmp_path: Path, saved: type, loaded: type) -> None:
    folder = save_base(tiny_llama, tmp_path)
    saved.from_pretrained(folder, quantization_config=AutoQRAQuantConfig(bits=3)).save_pretrained(tmp_path / "one")
    model = loaded.from_pretrained(tmp_path / "one")
    expected = loaded.from_pretrained(folder, quantization_config=AutoQRAQuantConfig(bits=3))
    assert_same_codes(model, expected)
    model.save_pretrained(tmp_path / "two")
    assert_same_codes(loaded.from_pretrained(tmp_path / "two"), expected)


def test_codes_found_by_error_feedback_go_the_same_ways(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    layers = {name: LayerPlan(3, 2) for name in linear_targets(load_dense(folder))}
    plan = BitRankPlan(layers, quantizer=QuantizerSettings(backend="gptq", group_size=32))
    data = [{"input_ids": torch.arange(3, 67).view(4, 16)}]
    plan = calibrate_plan(plan, load_dense(folder), data)
    expected = adapt(load_dense(folder), plan=plan)

    base = load_streaming(folder, AutoQRAQuantConfig(plan=plan))
    base.save_pretrained(tmp_path / "quantized")
    again = load_dense(tmp_path / "quantized")
    assert_same_codes(base, again)
    for model in (adapt(base, plan=plan), adapt(again, plan=plan)):
        assert torch.equal(logits(model), logits(expected))
    with pytest.raises(InvalidPlanError, match="'gptq' needs a calibrated plan"):
        load_streaming(folder, AutoQRAQuantConfig(plan=plan.replace(calibration=None, initialization="zero")))


def test_a_quantized_base_is_refused_where_plans_are_made(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3))
    with pytest.raises(InvalidPlanError, match="quantized already, so there is nothing left to plan"):
        linear_targets(model)


def test_a_base_that_was_quantized_in_place_is_saved_after_unloading(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    folder = save_base(tiny_llama, tmp_path)
    plan = calibrated_plan(load_dense(folder))
    unloaded = adapt(load_dense(folder), plan=plan).unload()
    unloaded.save_pretrained(tmp_path / "quantized")
    streamed = load_streaming(folder, AutoQRAQuantConfig(plan=plan))
    again = load_dense(tmp_path / "quantized")
    assert_same_codes(again, unloaded)
    assert torch.equal(logits(again), logits(unloaded))
    assert again.config.quantization_config == streamed.config.quantization_config
    adapt(again, plan=plan)  # knows the fingerprint


def test_a_quantized_base_without_a_plan_of_ours_is_saved_as_well(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    model = adapt(tiny_llama(), bits=3, r=4)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("plain")
    model.delete_adapter("default")
    unloaded = model.unload()
    unloaded.save_pretrained(tmp_path)
    again = load_dense(tmp_path)
    assert_same_codes(again, unloaded)
