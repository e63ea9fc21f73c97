"""The configuration: what a plan decides, what contradicts it, and what goes to disk."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, PeftType

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import Correction, PlanCalibration
from peft_autoqra.tuner.config import AutoQRAConfig, exact_pattern

LAYERS = {"a.q_proj": LayerPlan(3, 4), "a.k_proj": LayerPlan(16, 8), "b.q_proj": LayerPlan(2, 0)}
PLAN = BitRankPlan(LAYERS, quantizer=QuantizerSettings(group_size=32), base_model=BaseModelInfo(fingerprint="f" * 32))
CALIBRATION = PlanCalibration(
    input_second_moments={"a.q_proj": np.ones(64, np.float32)},
    corrections={"a.q_proj": Correction(left=np.ones((8, 4), np.float16), right=np.ones((4, 64), np.float16))},
)
COMPENSATED = PLAN.replace(initialization="compensate", calibration=CALIBRATION)


def test_a_plan_decides_modules_ranks_bits_and_quantizer() -> None:
    config = AutoQRAConfig(plan=PLAN)
    assert set(config.target_modules) == {"a.q_proj", "a.k_proj"}
    assert config.r == 8
    assert config.rank_pattern == {r"^a\.q_proj": 4}
    assert config.bits_pattern == {r"^a\.q_proj": 3, r"^a\.k_proj": 16, r"^b\.q_proj": 2}
    assert config.quantizer == PLAN.quantizer
    assert config.base_fingerprint == "f" * 32
    assert config.calibration_digest is None


def test_defaults() -> None:
    config = AutoQRAConfig()
    assert config.peft_type == PeftType.LORA
    assert isinstance(config, LoraConfig)
    assert (config.bits, config.target_modules, config.group_size) == (4, "all-linear", 64)
    assert config.use_rslora is True
    assert config.init_lora_weights is True


def test_what_is_given_beats_the_defaults() -> None:
    config = AutoQRAConfig(plan=COMPENSATED, use_rslora=False, init_lora_weights=True, lora_alpha=3, lora_dropout=0.1)
    assert config.use_rslora is False
    assert config.init_lora_weights is True
    assert (config.lora_alpha, config.lora_dropout) == (3, 0.1)
    assert AutoQRAConfig(plan=COMPENSATED).init_lora_weights == "compensate"
    assert AutoQRAConfig(plan=COMPENSATED, init_lora_weights="gaussian").init_lora_weights == "gaussian"


def test_the_plans_own_values_may_be_repeated() -> None:
    plan = BitRankPlan({"a": LayerPlan(3, 4)}, quantizer=QuantizerSettings(group_size=32))
    config = AutoQRAConfig(plan=plan, r=4, bits=3, group_size=32, quant_backend="native")
    assert config == AutoQRAConfig(plan=plan, bits=3)


def test_alpha_is_the_one_that_was_searched(tmp_path: Path) -> None:
    searched = PLAN.replace(provenance={"lora_alpha": 32})
    assert AutoQRAConfig(plan=searched).lora_alpha == 32
    assert AutoQRAConfig(plan=searched, lora_alpha=8).lora_alpha == 8
    assert AutoQRAConfig(plan=PLAN).lora_alpha == AutoQRAConfig().lora_alpha == 8
    AutoQRAConfig(plan=searched, lora_alpha=3).save_pretrained(tmp_path)
    assert AutoQRAConfig.from_pretrained(tmp_path).lora_alpha == 3
    assert replace(AutoQRAConfig(plan=searched, lora_alpha=3), r=2).lora_alpha == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits=5 is not supported"),
        ({"bits": "4"}, "bits='4' is not supported"),
        ({"bits_pattern": {"q_proj": 7}}, "bits=7 is not supported"),
        ({"bits_pattern": {"q_proj(": 4}}, r"'q_proj\(' is no regular expression"),
        ({"group_size": 48}, "group_size=48"),
        ({"quant_backend": "hqq"}, "'hqq' is unknown"),
        ({"init_lora_weights": "pissa"}, "'pissa' rewrites or needs the 16-bit base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "eva"}, "eva"),
        ({"init_lora_weights": "compensate"}, "needs a plan with calibration"),
        ({"plan": PLAN, "init_lora_weights": "compensate"}, "needs a plan with calibration"),
        ({"plan": PLAN.replace(initialization="compensate")}, "needs a plan with calibration"),
        ({"plan": PLAN, "target_modules": ["q_proj"]}, r"already decides \['target_modules'\]"),
        ({"plan": PLAN, "rank_pattern": {"q_proj": 3}}, "already decides .*rank_pattern"),
        ({"plan": PLAN, "bits_pattern": {"q_proj": 3}}, "already decides .*bits_pattern"),
        ({"plan": PLAN, "r": 64, "group_size": 128}, r"already decides \['r', 'group_size'\]"),
        ({"plan": PLAN, "bits": 2}, r"already decides \['bits'\]"),
        ({"plan": PLAN, "quant_backend": "bitsandbytes"}, r"already decides \['quant_backend'\]"),
        ({"plan": BitRankPlan({"a": LayerPlan(4, 0)})}, "Every rank of the plan is 0"),
        ({"plan": 3}, "plan=3"),
        ({"plan": {"a": (4, 8)}}, "LayerPlan"),
        ({"layer_replication": [(0, 2)]}, "layer_replication is not supported"),
        ({"r": 0}, "rank 0.*at least 1"),
        ({"r": 2.5}, "rank=2.5"),
        ({"rank_pattern": {"q_proj": 0}}, "an adapter needs a rank of at least 1"),
    ],
)
def test_what_is_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoQRAConfig(**settings)


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(InvalidPlanError, match="no autoqra_plan"):
        AutoQRAConfig(plan=tmp_path)


def test_a_mapping_of_layer_plans_will_do_as_a_plan() -> None:
    assert AutoQRAConfig(plan=dict(LAYERS)).plan == BitRankPlan(LAYERS)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, replace, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("settings", [{}, {"plan": PLAN}, {"plan": COMPENSATED}])
def test_copies_are_equal(settings: dict[str, Any], copied: Any) -> None:
    config = AutoQRAConfig(**settings)
    twin = copied(config)
    assert twin == config
    assert twin.plan == config.plan
    assert (twin.calibration is None) == (config.calibration is None)
    assert twin.to_dict() == config.to_dict()


def test_changing_one_value_keeps_the_rest() -> None:
    config = replace(AutoQRAConfig(plan=COMPENSATED), lora_dropout=0.5)
    assert config.lora_dropout == 0.5
    assert config.init_lora_weights == "compensate"
    assert config.bits_pattern == AutoQRAConfig(plan=PLAN).bits_pattern


@pytest.mark.parametrize("settings", [{}, {"plan": PLAN}, {"plan": COMPENSATED}])
def test_the_dictionary_is_json_without_plan_or_unknown_initializations(settings: dict[str, Any]) -> None:
    config = AutoQRAConfig(**settings)
    content = config.to_dict()
    assert content["init_lora_weights"] is True
    assert not {"plan", "calibration", "quantizer"} & content.keys()
    assert config.plan == settings.get("plan")  # still there
    json.dumps({key: sorted(value) if isinstance(value, set) else value for key, value in content.items()})


def test_saving_without_an_adapter_beside_it(tmp_path: Path) -> None:
    AutoQRAConfig(plan=COMPENSATED).save_pretrained(tmp_path)
    loaded = AutoQRAConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, AutoQRAConfig)
    assert loaded.calibration is not None
    assert loaded.calibration_digest == loaded.calibration.digest
    assert loaded.bits_pattern == AutoQRAConfig(plan=PLAN).bits_pattern


def test_exact_patterns_match_one_name_only() -> None:
    assert exact_pattern("model.layers.1.q_proj") == r"^model\.layers\.1\.q_proj"


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "x", 10**400, -1, 0, True, [1]])
def test_alphas_that_are_no_positive_numbers(alpha: Any) -> None:
    plan = BitRankPlan({"a": LayerPlan(4, 4)}, provenance={"lora_alpha": alpha})
    for settings in ({"plan": plan}, {"lora_alpha": alpha}, {"alpha_pattern": {"a": alpha}}):
        with pytest.raises(InvalidPlanError, match=r"(lora_alpha|alpha_pattern) is .* positive number"):
            AutoQRAConfig(**settings)


def test_alphas_may_be_fractions() -> None:
    config = AutoQRAConfig(lora_alpha=0.5, alpha_pattern={"a": 2.5, "b": 3})  # type: ignore[arg-type]
    assert (config.lora_alpha, config.alpha_pattern) == (0.5, {"a": 2.5, "b": 3})
