"""Saved and loaded again, a model computes the same to the last bit; without this package it is plain LoRA."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, PlanCalibration
from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.tuner.config import AutoQRAConfig
from tests.conftest import TinyLlamaFactory
from tests.tuner.synthetic import calibrated_plan, logits, mixed_plan, randomize_adapters

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MakeConfig = Callable[[nn.Module], AutoQRAConfig]


def mixed(base: nn.Module) -> AutoQRAConfig:
    return AutoQRAConfig(plan=mixed_plan(base), task_type="CAUSAL_LM")


def compensated(base: nn.Module) -> AutoQRAConfig:
    return AutoQRAConfig(plan=calibrated_plan(base), task_type="CAUSAL_LM", lora_alpha=5)


def uniform(base: nn.Module) -> AutoQRAConfig:
    pattern = {r"^model\.layers\.0\.mlp\.down_proj": 8, "v_proj": 16}
    return AutoQRAConfig(bits=3, r=4, group_size=16, bits_pattern=pattern, task_type="CAUSAL_LM")


def overlapping(base: nn.Module) -> AutoQRAConfig:
    """PEFT sorts patterns when it saves; the first match wins, and it must be the same one after a reload."""
    bits = {r"layers\.0\.mlp\.up_proj": 2, r".*up_proj": 8, r"v_proj": 16, r"1\..*down_proj": 2, "down_proj": 3}
    ranks = {r"layers\.0\.mlp\.up_proj": 6, r".*up_proj": 2}
    return AutoQRAConfig(bits=4, r=4, bits_pattern=bits, rank_pattern=ranks, task_type="CAUSAL_LM")


def nf4(base: nn.Module) -> AutoQRAConfig:
    return AutoQRAConfig(
        bits=4, r=4, quant_backend="bitsandbytes", target_modules=["q_proj"], bits_pattern={"up_proj": 4}
    )


def int8(base: nn.Module) -> AutoQRAConfig:
    """With NF4, int8 and 16 bits, with adapters and without."""
    pattern = {"up_proj": 4, "k_proj": 16, "down_proj": 8}
    return AutoQRAConfig(
        bits=8, r=4, quant_backend="bitsandbytes", target_modules=["q_proj", "down_proj"], bits_pattern=pattern
    )


CONFIGS = {make.__name__: make for make in (mixed, compensated, uniform, overlapping, nf4, int8)}


def save_base(make: TinyLlamaFactory, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    make().to(dtype).save_pretrained(folder / "base")
    return folder / "base"


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def save_adapter(base: Path, make_config: MakeConfig, dtype: torch.dtype = torch.float32) -> tuple[Path, Tensor]:
    """An adapter with random weights, and the logits of the model it was saved from."""
    dense = load_base(base, dtype)
    model = get_peft_model(dense, make_config(dense))
    randomize_adapters(model)
    model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter", logits(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_model_from_pretrained(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, name: str, dtype: torch.dtype, low_cpu_mem_usage: bool
) -> None:
    base = save_base(tiny_llama, tmp_path, dtype)
    adapter, expected = save_adapter(base, CONFIGS[name], dtype)
    model = PeftModel.from_pretrained(load_base(base, dtype), adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expected)
    assert isinstance(model.peft_config["default"], AutoQRAConfig)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_auto_peft_model(tiny_llama: TinyLlamaFactory, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    adapter, expected = save_adapter(save_base(tiny_llama, tmp_path, dtype), CONFIGS[name], dtype)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype)), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_load_adapter(tiny_llama: TinyLlamaFactory, tmp_path: Path, name: str) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, expected = save_adapter(base, CONFIGS[name])
    model = load_base(base)
    model.load_adapter(str(adapter))
    assert torch.equal(logits(model), expected)


def test_transformers_from_pretrained_of_the_adapter(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    adapter, expected = save_adapter(save_base(tiny_llama, tmp_path), compensated)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)


def test_saving_a_loaded_adapter_again_changes_nothing(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, expected = save_adapter(base, compensated)
    PeftModel.from_pretrained(load_base(base), adapter).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(base), tmp_path / "again")), expected)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "again")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[1] == configs[0] | {"inference_mode": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make_plan", [mixed_plan, calibrated_plan])
def test_a_saved_and_loaded_plan_builds_the_same_model(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, make_plan: Callable[[nn.Module], BitRankPlan], dtype: torch.dtype
) -> None:
    plan = make_plan(tiny_llama().to(dtype))
    plan.save_pretrained(tmp_path)
    results = []
    for given in (plan, BitRankPlan.from_pretrained(tmp_path), tmp_path, str(tmp_path)):
        model = get_peft_model(tiny_llama().to(dtype), AutoQRAConfig(plan=given))
        if make_plan is mixed_plan:  # starts at zero
            randomize_adapters(model)
        results.append(logits(model))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_the_folder_of_an_adapter_will_do_for_its_plan(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, _ = save_adapter(base, mixed)
    plan = BitRankPlan.from_pretrained(adapter)
    original = mixed_plan(load_base(base))
    assert plan == original
    assert plan.shapes == original.shapes
    assert plan.base_model.fingerprint == original.base_model.fingerprint


def test_the_folder_of_a_compensated_adapter_gives_its_bits_and_moments(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    adapter, _ = save_adapter(save_base(tiny_llama, tmp_path), compensated)
    plan = BitRankPlan.from_pretrained(adapter)
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=plan))
    reference = PeftModel.from_pretrained(tiny_llama(), adapter)
    with model.disable_adapter(), reference.disable_adapter():
        assert torch.equal(logits(model), logits(reference))


def test_the_adapter_carries_moments_but_no_corrections(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    adapter, _ = save_adapter(save_base(tiny_llama, tmp_path), compensated)
    calibration = PlanCalibration.load(adapter / ADAPTER_CALIBRATION_FILE)
    assert not calibration.corrections
    assert calibration.input_second_moments


def test_an_adapter_without_calibration_has_no_calibration_file(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    adapter, _ = save_adapter(save_base(tiny_llama, tmp_path), mixed)
    assert not (adapter / ADAPTER_CALIBRATION_FILE).exists()


def test_a_plan_and_the_adapter_of_another_may_share_a_folder(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    plan = calibrated_plan(load_base(base))
    other = plan.replace(calibration=PlanCalibration(corrections=plan.calibration.corrections))
    other.save_pretrained(tmp_path / "adapter")
    adapter, expected = save_adapter(base, compensated)
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(base), adapter)), expected)
    kept = BitRankPlan.from_pretrained(adapter)
    assert kept.calibration.digest == other.calibration.digest
    get_peft_model(load_base(base), AutoQRAConfig(plan=kept))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_on_disk_is_one_that_plain_peft_understands(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, name: str
) -> None:
    adapter, _ = save_adapter(save_base(tiny_llama, tmp_path), CONFIGS[name])
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert config["use_rslora"] is True
    assert "plan" not in config
    assert config["autoqra_version"] == 1
    assert (config["calibration_digest"] is not None) is (name == "compensated")
    assert len(config["base_fingerprint"]) == 32


def test_the_header_of_the_adapter_keeps_what_peft_wrote(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    adapter, _ = save_adapter(save_base(tiny_llama, tmp_path), mixed)
    with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert "autoqra_plan" in metadata
    assert [path.name for path in adapter.glob("*.partial")] == []


# -------------------------------------------------------------------------------------------------------- bad input


def change_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [2, 99, "new", None])
def test_an_adapter_of_a_newer_format(tiny_llama: TinyLlamaFactory, tmp_path: Path, version: object) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, _ = save_adapter(base, mixed)
    change_config(adapter, autoqra_version=version)
    with pytest.raises(InvalidPlanError, match=r"reads up to 1: upgrade with `pip"):
        PeftModel.from_pretrained(load_base(base), adapter)
    with pytest.raises(InvalidPlanError, match=r"reads up to 1"):
        PeftConfig.from_pretrained(adapter)


def test_a_missing_calibration_file(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, _ = save_adapter(base, compensated)
    (adapter / ADAPTER_CALIBRATION_FILE).unlink()
    with pytest.raises(InvalidPlanError, match=rf"{ADAPTER_CALIBRATION_FILE} is missing beside the adapter"):
        PeftModel.from_pretrained(load_base(base), adapter)


def test_the_calibration_of_another_adapter(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, _ = save_adapter(base, compensated)
    PlanCalibration(input_second_moments={"a": np.ones(2, np.float32)}).save(adapter, ADAPTER_CALIBRATION_FILE)
    with pytest.raises(PlanMismatchError, match=rf"{ADAPTER_CALIBRATION_FILE} belongs to another plan or adapter"):
        PeftModel.from_pretrained(load_base(base), adapter)
    with pytest.raises(PlanMismatchError, match=rf"{ADAPTER_CALIBRATION_FILE} belongs to another plan or adapter"):
        BitRankPlan.from_pretrained(adapter)


def test_a_configuration_that_lost_its_calibration(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, _ = save_adapter(base, compensated)
    config = replace(PeftConfig.from_pretrained(adapter), lora_dropout=0.1)
    with pytest.raises(InvalidPlanError, match="calibration that it has lost"):
        get_peft_model(load_base(base), config)


def test_an_adapter_on_another_base(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    adapter, _ = save_adapter(save_base(tiny_llama, tmp_path), mixed)
    with pytest.raises(PlanMismatchError, match="Load the same base model"):
        PeftModel.from_pretrained(tiny_llama(seed=1), adapter)


def test_unknown_keys_of_a_newer_peft_are_ignored_with_a_warning(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, expected = save_adapter(base, mixed)
    change_config(adapter, key_of_tomorrow=1)
    with pytest.warns(UserWarning, match="key_of_tomorrow"):
        model = PeftModel.from_pretrained(load_base(base), adapter)
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------------------------- other ways to load


def test_an_adapter_in_a_subfolder(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, expected = save_adapter(base, compensated)
    shutil.move(adapter, tmp_path / "checkpoints" / "last")
    model = PeftModel.from_pretrained(load_base(base), tmp_path / "checkpoints", subfolder="last")
    assert torch.equal(logits(model), expected)


def test_a_config_given_beside_the_adapter(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, expected = save_adapter(base, compensated)
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, AutoQRAConfig)
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(base), adapter, config=config)), expected)


def test_autoqra_config_from_pretrained(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    adapter, _ = save_adapter(save_base(tiny_llama, tmp_path), compensated)
    assert AutoQRAConfig.from_pretrained(adapter).calibration is not None


VANILLA = """
import json, sys, warnings
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, inputs = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
assert "peft_autoqra" not in sys.modules
with torch.no_grad():
    logits = model.eval()(input_ids=torch.tensor(json.loads(inputs))).logits
print(json.dumps({
    "config": type(model.peft_config["default"]).__name__,
    "ranks": {n: m.r["default"] for n, m in layers.items()},
    "scalings": {n: m.scaling["default"] for n, m in layers.items()},
    "base": sorted({type(m.get_base_layer()).__name__ for m in layers.values()}),
    "warnings": [str(w.message) for w in caught if "autoqra" in str(w.message)],
    "other_warnings": [str(w.message)[:200] for w in caught if w.category is not DeprecationWarning],
    "logits": logits.flatten().tolist(),
}))
"""


def test_peft_without_this_package_reads_plain_lora(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    adapter, _ = save_adapter(base, compensated)
    tokens = [[3, 1, 4, 1, 5]]
    command = [sys.executable, "-c", VANILLA, str(base), str(adapter), json.dumps(tokens)]
    completed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120)
    seen = json.loads(completed.stdout.splitlines()[-1])

    plan = mixed_plan(tiny_llama())
    ranks = {name: layer.rank for name, layer in plan.items() if layer.rank}
    assert seen["config"] == "LoraConfig"
    assert seen["ranks"] == ranks
    assert seen["scalings"] == pytest.approx({name: 5 * 16 / rank**1.5 for name, rank in ranks.items()})
    assert seen["base"] == ["Linear"]
    assert len(seen["warnings"]) == 1
    others = [warning for warning in seen["other_warnings"] if "is_gradient_checkpointing" not in warning]
    assert others == [warning[:200] for warning in seen["warnings"]]

    dense, tensors = tiny_llama(), load_file(adapter / ADAPTER_FILE)  # W + scaling B A by hand
    for name, rank in ranks.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        dense.get_submodule(name).weight.data += 5 * 16 / rank**1.5 * b @ a
    with torch.no_grad():
        expected = dense(input_ids=torch.tensor(tokens)).logits
    torch.testing.assert_close(torch.tensor(seen["logits"]).view(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_plain_lora_saves_and_loads_as_ever(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = save_base(tiny_llama, tmp_path)
    model = get_peft_model(load_base(base), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "plain")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert not any("autoqra" in key for key in json.loads((tmp_path / "plain" / "adapter_config.json").read_text()))
    assert all(type(module).__module__.startswith("peft.") for module in loaded.modules() if hasattr(module, "lora_A"))
