"""The configuration: checked at once, and the same after a detour over JSON."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

from peft_autoqra import AutoQRAQuantConfig, BitRankPlan, LayerPlan
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_MODULES
from peft_autoqra.streaming.quant_config import QuantizedModule
from tests.conftest import TinyLlamaFactory
from tests.tuner.synthetic import calibrated_plan, mixed_plan

PLAN = BitRankPlan({"model.layers.0.mlp.down_proj": LayerPlan(3, 0), "model.layers.1.mlp.down_proj": LayerPlan(16, 4)})
MODULES = {
    "a": {"bits": 3, "shape": [8, 16], "group_size": 8, "calibration_digest": "ab"},
    "b": {"bits": 16, "shape": [8, 8]},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"bits": 3, "group_size": 32, "bits_pattern": {"v_proj": 8}, "target_modules": {"v_proj", "q_proj"}},
    "nf4": {"quant_backend": "bitsandbytes", "target_modules": "all-linear"},
    "plan": {"plan": PLAN},
    "loaded": {"modules": MODULES, "base_fingerprint": "0" * 32},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_over_json(name: str) -> None:
    config = AutoQRAQuantConfig(**CONFIGS[name])
    content = json.loads(config.to_json_string())
    assert content["quant_method"] == "autoqra"
    again = AutoQuantizationConfig.from_dict(content)
    assert again == config
    assert again.plan == config.plan
    assert again.modules == config.modules
    assert copy.deepcopy(config) == config
    assert dict(config) == config.to_dict()
    assert config != AutoQRAQuantConfig(bits=2)


def test_plans_from_folders_and_mappings(tmp_path: Path) -> None:
    PLAN.save_pretrained(tmp_path)
    assert AutoQRAQuantConfig(plan=tmp_path) == AutoQRAQuantConfig(plan=dict(PLAN)) == AutoQRAQuantConfig(plan=PLAN)


def test_json_holds_no_calibration(tiny_llama: TinyLlamaFactory) -> None:
    model = tiny_llama()
    with pytest.raises(InvalidPlanError, match="does not hold its calibration"):
        AutoQRAQuantConfig.from_dict(AutoQRAQuantConfig(plan=calibrated_plan(model)).to_dict())
    plan = mixed_plan(model)
    assert AutoQRAQuantConfig.from_dict(AutoQRAQuantConfig(plan=plan).to_dict()).plan.shapes == plan.shapes


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits_pattern": {"v_proj": 1}}, "bits=1"),
        ({"bits_pattern": {"(": 3}}, "regular expression"),
        ({"group_size": 48}, "group_size=48"),
        ({"quant_backend": "hqq"}, "'hqq'"),
        ({"quant_backend": "gptq"}, "'gptq' needs a calibrated plan"),
        ({"bits_pattern": ["a"]}, r"bits_pattern=\['a'\] must be a mapping"),
        ({"target_modules": 5}, "target_modules=5 must be"),
        ({"modules": ["a"]}, r"modules=\['a'\] must be a mapping"),
        ({"plan": {"a": LayerPlan(3, 0)}, "base_fingerprint": "x"}, "base_fingerprint='x' is not the plan's"),
        ({"plan": 7}, "plan=7"),
        ({"plan": {"a": 3}}, "LayerPlan"),
        ({"plan": PLAN, "target_modules": ["a"]}, "already decides"),
        ({"plan": PLAN, "bits": 8}, "already decides"),
        ({"bit": 3}, r"does not know \['bit'\]"),
        ({"quant_method": "gptq"}, "another quantizer"),
        ({"autoqra_version": 2}, "upgrade"),
        ({"modules": {"a": {"bits": 3}}}, "damaged"),
        ({"modules": {"a/b": QuantizedModule(bits=3, shape=(8, 8))}}, "names the module 'a/b'"),
        ({"modules": dict.fromkeys(range(MAX_MODULES + 1))}, f"{MAX_MODULES + 1} modules, at most {MAX_MODULES}"),
        ({"target_modules": map(str, range(MAX_MODULES + 1))}, f"{MAX_MODULES + 1} modules, at most {MAX_MODULES}"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidPlanError, match=match):
        AutoQRAQuantConfig(**settings)


def test_copies_share_what_cannot_change() -> None:
    config = AutoQRAQuantConfig(modules={"a": {"bits": 3, "shape": [8, 8], "group_size": 8}})
    assert copy.deepcopy(config).modules["a"] is config.modules["a"]
