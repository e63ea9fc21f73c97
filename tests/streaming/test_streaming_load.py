"""Quantized while it is read, a model is the one that quantizing in place makes, to the last bit."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig, BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.quant.backends import layer_bits
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.streaming import weight_stream
from peft_autoqra.streaming.hf_quantizer import AutoQRAHfQuantizer, register
from tests.conftest import TinyLlamaFactory
from tests.streaming.bases import adapt, assert_same_codes, load_dense, load_streaming, save_base
from tests.tuner.synthetic import calibrated_plan, logits, mixed_plan, randomize_adapters

DTYPES = (torch.float32, torch.bfloat16)


def nf4_plan(model: nn.Module) -> BitRankPlan:
    plan = mixed_plan(model)
    layers = {n: LayerPlan(16 if layer.bits == 16 else 4, layer.rank) for n, layer in plan.items()}
    return plan.replace(layers=layers, quantizer=QuantizerSettings(backend="bitsandbytes"))


PLANS = {"mixed": mixed_plan, "calibrated": calibrated_plan, "nf4": nf4_plan}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_gives_what_quantizing_in_place_gives(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, name: str, shard_size: str, dtype: torch.dtype
) -> None:
    folder = save_base(tiny_llama, tmp_path, shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "50KB")
    plan = PLANS[name](load_dense(folder, dtype))
    expected = adapt(load_dense(folder, dtype), plan=plan)
    model = adapt(load_streaming(folder, AutoQRAQuantConfig(plan=plan), dtype), plan=plan)
    assert_same_codes(expected, model)
    assert torch.equal(logits(model), logits(expected))
    config = model.peft_config["default"]
    assert config.base_fingerprint == plan.base_model.fingerprint
    assert config.plan == expected.peft_config["default"].plan


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_plan_all_linear_layers_but_the_head(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, dtype: torch.dtype
) -> None:
    settings: dict[str, Any] = {"bits": 3, "group_size": 32, "bits_pattern": {r"0\.mlp\.down_proj": 8, "v_proj": 16}}
    folder = save_base(tiny_llama, tmp_path, tie_word_embeddings=False)
    expected = adapt(load_dense(folder, dtype), **settings)
    base = load_streaming(folder, AutoQRAQuantConfig(**settings), dtype)
    assert type(base.lm_head) is nn.Linear
    assert layer_bits(base.model.layers[0].mlp.down_proj) == 8
    assert type(base.model.layers[1].self_attn.v_proj) is nn.Linear
    model = adapt(base, **settings)  # all-linear, and PEFT does not know the quantized layers
    assert_same_codes(expected, model)
    assert torch.equal(logits(model), logits(expected))
    assert model.peft_config["default"].base_fingerprint == expected.peft_config["default"].base_fingerprint


def test_biases_are_read(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path, attention_bias=True)
    weights = load_file(folder / "model.safetensors")
    weights = {n: torch.full_like(t, 0.5) if n.endswith(".bias") else t for n, t in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    expected = adapt(load_dense(folder), bits=3).unload()
    model = load_streaming(folder, AutoQRAQuantConfig(bits=3))
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)
    assert torch.equal(logits(model), logits(expected))


def test_no_dense_layer_is_ever_filled(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living: list[int] = []
    original = weight_stream.WeightStream.quantize

    def watched(self: Any, model: nn.Module, module_name: str, weight: torch.Tensor) -> None:
        dense = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type != "meta"]
        living.append(len(dense))
        original(self, model, module_name, weight)

    monkeypatch.setattr(weight_stream.WeightStream, "quantize", watched)
    model = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3), torch.bfloat16)
    assert living == [0] * 14
    assert [n for n, m in model.named_modules() if type(m) is nn.Linear] == ["lm_head"]
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_every_weight_is_dropped_before_the_next_is_read(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[Any] = []
    original = weight_stream.WeightStream.quantize

    def watched(self: Any, model: nn.Module, module_name: str, weight: torch.Tensor) -> None:
        assert all(reference() is None for reference in weights)
        weights.append(weakref.ref(weight))
        original(self, model, module_name, weight)

    monkeypatch.setattr(weight_stream.WeightStream, "quantize", watched)
    load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3), torch.bfloat16)
    assert len(weights) == 14


def test_one_configuration_loads_several_models(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    config = AutoQRAQuantConfig(bits=3)
    before = config.to_dict()
    one, two = load_streaming(folder, config), load_streaming(folder, config)
    assert config.to_dict() == before
    assert_same_codes(one, two)
    assert one.config.quantization_config == two.config.quantization_config


def test_a_copy_is_a_whole_model(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits(load_dense(tmp_path / "twin")), logits(model))


# ------------------------------------------------------------------------------------------------------------ adapters
def test_an_adapter_reloads_on_it(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    plan = calibrated_plan(load_dense(folder))
    model = adapt(load_streaming(folder, AutoQRAQuantConfig(plan=plan)), plan=plan)
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    quantization_config = AutoQRAQuantConfig(plan=tmp_path / "adapter")
    streamed = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=quantization_config)
    assert torch.equal(logits(streamed), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    for low_cpu_mem_usage in (False, True):
        base = load_streaming(folder, AutoQRAQuantConfig(plan=plan))
        again = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again), expected)


def test_another_adapter_than_it_was_quantized_for_is_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    plan = calibrated_plan(load_dense(folder))
    base = load_streaming(folder, AutoQRAQuantConfig(plan=plan.replace(calibration=None, initialization="zero")))
    with pytest.raises(InvalidPlanError, match="quantized to 2 bits already, and not as the new adapter wants"):
        adapt(base, plan=plan)


def test_the_recorded_fingerprint_is_checked(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    plan = mixed_plan(load_dense(folder)).replace(base_model=BaseModelInfo())
    base = load_streaming(folder, AutoQRAQuantConfig(plan=plan))
    with pytest.raises(PlanMismatchError, match="fingerprint"):
        adapt(base, plan=mixed_plan(tiny_llama(seed=1)))


def test_plain_lora_on_all_linear_layers(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len([n for n, _ in model.named_modules() if n.endswith("lora_A.default")]) == 14


def test_kbit_preparation_and_training(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3), torch.bfloat16)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert base.model.layers[0].self_attn.q_proj.W_q.dtype == torch.uint8
    assert {p.dtype for p in base.parameters() if p.is_floating_point()} == {torch.float32}
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=2, report_to="none", disable_tqdm=True
    )
    data = [{"input_ids": [1, 5, 9, 3], "labels": [1, 5, 9, 3]}] * 4
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=base, args=args, train_dataset=data)
    model = adapt(base, bits=3, r=4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    Trainer(model=model, args=args, train_dataset=data).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_merged_it_is_an_ordinary_model(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = adapt(load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3)), bits=3, r=4)
    randomize_adapters(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    assert torch.equal(logits(load_dense(tmp_path / "merged")), logits(merged))


def test_dequantize(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3))
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load_dense(tmp_path / "dense")), expected)


def test_classification_heads_stay_as_they_are(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, quantization_config=AutoQRAQuantConfig(bits=3)
    )
    assert type(model.score) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


# ------------------------------------------------------------------------------------------------------------ refusals
def refuse(folder: Path, error: type[Exception], match: str, **settings: Any) -> None:
    with pytest.raises(error, match=match):
        load_streaming(folder, AutoQRAQuantConfig(**settings))


def test_plans_that_do_not_fit_are_refused_before_any_weight_is_read(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_base(tiny_llama, tmp_path)
    plan = mixed_plan(load_dense(folder))
    monkeypatch.setattr("transformers.core_model_loading._materialize_copy", lambda *_, **__: pytest.fail("read"))
    name = "model.layers.0.mlp.up_proj"
    refuse(folder, PlanMismatchError, "close names", plan={"model.layers.0.mlp.upp_proj": LayerPlan(3, 0)})
    refuse(folder, PlanMismatchError, "shape", plan=plan.replace(shapes={name: (32, 32)}))
    refuse(folder, InvalidPlanError, "match no module", bits_pattern={"nothing": 3})
    refuse(folder, InvalidPlanError, "match no module", target_modules=["nothing"])
    refuse(folder, InvalidPlanError, "only nn.Linear", plan={"model.embed_tokens": LayerPlan(3, 0)})
    refuse(folder, InvalidPlanError, "tied", plan={"lm_head": LayerPlan(3, 0)})
    calibrated = calibrated_plan(tiny_llama(intermediate_size=64))
    refuse(folder, PlanMismatchError, "The calibration of", plan=calibrated.replace(shapes={}))


def test_other_weights_are_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    refuse(folder, PlanMismatchError, "fingerprint", plan=mixed_plan(tiny_llama(seed=1)))
    refuse(folder, PlanMismatchError, "fingerprint", bits=3, base_fingerprint="0" * 32)


def test_damaged_checkpoints_are_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path, attention_bias=True)
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.self_attn.q_proj"

    def damaged(changes: dict[str, torch.Tensor | None]) -> None:
        content = {key: value for key, value in (weights | changes).items() if value is not None}
        save_file(content, path, {"format": "pt"})

    damaged({f"{name}.weight": torch.full((64, 64), torch.nan)})
    refuse(folder, InvalidPlanError, f"{name}' holds NaN", bits=3)
    damaged({f"{name}.weight": torch.zeros(32, 64)})
    refuse(folder, PlanMismatchError, r"has shape \(32, 64\)", bits=3)
    damaged({f"{name}.weight": None})
    refuse(folder, InvalidPlanError, f"no weight or bias for '{name}'", bits=3)
    damaged({f"{name}.bias": None})
    refuse(folder, InvalidPlanError, f"no weight or bias for '{name}'", bits=3)


def test_modules_on_the_disk_are_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    with pytest.raises(InvalidPlanError, match="'disk'"):
        AutoModelForCausalLM.from_pretrained(
            save_base(tiny_llama, tmp_path),
            quantization_config=AutoQRAQuantConfig(bits=3),
            device_map={"model": "cpu", "lm_head": "disk"},
        )


def test_a_device_map_counts_quantized_bytes(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    """Where the 16-bit model would not fit, transformers would put modules on the disk, which is refused."""
    folder = save_base(tiny_llama, tmp_path, num_hidden_layers=6, dtype="float32")
    dense = sum(tensor.nbytes for tensor in load_dense(folder).state_dict().values())
    memory = {"device_map": "auto", "max_memory": {"cpu": dense // 2}, "offload_folder": tmp_path / "offload"}
    load = AutoModelForCausalLM.from_pretrained
    assert "disk" in load(folder, **memory).hf_device_map.values()
    model = load(folder, quantization_config=AutoQRAQuantConfig(bits=3, group_size=32), **memory)
    assert torch.equal(logits(model), logits(load_streaming(folder, AutoQRAQuantConfig(bits=3, group_size=32))))


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=128, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    refuse(tmp_path, InvalidPlanError, "experts.gate_up_proj', .*which would stay at 16 bits", bits=3)


def test_registered_once() -> None:
    register()
    assert AUTO_QUANTIZER_MAPPING["autoqra"] is AutoQRAHfQuantizer


def test_nf4_is_not_saved(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=4, quant_backend="bitsandbytes"))
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    with pytest.raises(InvalidPlanError, match="NF4"):
        model.save_pretrained(tmp_path / "nf4")


def test_adapter_configuration_is_untouched(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    folder = save_base(tiny_llama, tmp_path)
    plan = mixed_plan(load_dense(folder))
    model = adapt(load_streaming(folder, AutoQRAQuantConfig(plan=plan)), plan=plan)
    assert isinstance(model.peft_config["default"], AutoQRAConfig)
    assert model.peft_config["default"].plan == plan
