"""Plans are found wherever they lie."""

from __future__ import annotations

import json

import pytest

from peft_autoqra import BitRankPlan, LayerPlan
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan_source import find_plan

PLAN = BitRankPlan({"model.layers.0.mlp.down_proj": LayerPlan(3, 4)})


def quantized_config(**changes):
    module = {"bits": 3, "shape": [64, 128], "group_size": 64}
    settings = {
        "quant_method": "autoqra",
        "autoqra_version": 1,
        "quant_backend": "native",
        "group_size": 64,
        "base_fingerprint": "f",
        "modules": {"model.layers.0.mlp.down_proj": module},
    }
    return {"model_type": "llama", "quantization_config": settings | changes}


def test_a_folder_named_like_a_revision_is_a_folder(tmp_path):
    PLAN.save_pretrained(tmp_path / "plan@2")
    assert find_plan(str(tmp_path / "plan@2")).plan == PLAN


def test_a_plan_beside_other_things_goes_before_them(tmp_path):
    PLAN.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(quantized_config()))
    found = find_plan(str(tmp_path))
    assert (found.kind, found.plan) == ("plan", PLAN)


def test_a_quantized_base_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(quantized_config()))
    found = find_plan(str(tmp_path))
    assert found.kind == "quantized base"
    assert dict(found.plan) == {"model.layers.0.mlp.down_proj": LayerPlan(3, 0)}
    assert found.plan.shapes == {"model.layers.0.mlp.down_proj": (64, 128)}
    assert found.plan.base_model.fingerprint == "f"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{broken", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"model_type": "llama"}), "There is no plan"),
        (json.dumps({"quantization_config": {"quant_method": "gptq"}}), "There is no plan"),
        (json.dumps(quantized_config(autoqra_version=9)), "upgrade"),
        (json.dumps(quantized_config(modules={})), "save the model again"),
        (json.dumps(quantized_config(modules={"a": {"bits": 5, "shape": [1, 1]}})), "bits=5"),
        (json.dumps(quantized_config(modules={"a": {"bits": 4, "shape": [1, -1]}})), "shape"),
        (json.dumps(quantized_config(modules={"a": 4})), "damaged"),
        (json.dumps(quantized_config(modules=[4])), "damaged"),
        (json.dumps(quantized_config(group_size="many")), "group_size"),
    ],
)
def test_configurations_that_hold_no_plan(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidPlanError, match=words):
        find_plan(str(tmp_path))


def test_a_search_under_way(tmp_path):
    (tmp_path / "trials.jsonl").touch()
    with pytest.raises(InvalidPlanError, match="no plan yet"):
        find_plan(str(tmp_path))


@pytest.mark.parametrize("source", ["no/such/folder", "", "."])
def test_nothing_there(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidPlanError):
        find_plan(source)


def test_an_empty_name_is_not_this_folder():
    with pytest.raises(InvalidPlanError, match="empty"):
        find_plan("")
