"""Plans calibrated for their own bits and ranks, and what they give once applied, saved and loaded."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_autoqra import AutoQRAConfig, BitRankPlan, LayerPlan, QuantizerSettings, calibrate_plan
from peft_autoqra.errors import CalibrationError, InvalidPlanError, PlanMismatchError
from peft_autoqra.importance import calibrated_plan, compensation
from peft_autoqra.target_modules import linear_targets

NAME = "model.layers.0.self_attn.q_proj"


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))}]


def make_plan(model, backend: str = "native", group_size: int = 32) -> BitRankPlan:
    bits, ranks = (2, 3, 4, 8, 16), (4, 0, 2)
    layers = {name: LayerPlan(bits[i % 5], ranks[i % 3]) for i, name in enumerate(linear_targets(model))}
    return BitRankPlan(layers, quantizer=QuantizerSettings(backend=backend, group_size=group_size))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batches()[0]).logits


def apply(model, plan: BitRankPlan):
    return get_peft_model(model, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(("backend", "alternations"), [("gptq", 0), ("gptq", 2), ("native", 2), ("native", 0)])
def test_adapter_and_plan_come_back_to_the_last_bit(tiny_llama, tmp_path, backend, alternations):
    plan = calibrate_plan(make_plan(tiny_llama(), backend), tiny_llama(), batches(), alternations=alternations)
    model = apply(tiny_llama(), plan)
    expected = logits(model)
    plan.save_pretrained(tmp_path / "plan")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(apply(tiny_llama(), BitRankPlan.from_pretrained(tmp_path / "plan"))), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")), expected)


@pytest.mark.parametrize(("backend", "alternations"), [("gptq", 0), ("native", 3)])
def test_what_loses_less_starts_closer_to_the_dense_model(tiny_llama, backend, alternations):
    """By the divergence of predictions on the calibration data, which all of them are fitted to."""
    dense = logits(tiny_llama()).log_softmax(-1)

    def divergence(plan: BitRankPlan) -> float:
        start = logits(apply(tiny_llama(), plan)).log_softmax(-1)
        return float((dense.exp() * (dense - start)).sum(-1).mean())

    plain = calibrate_plan(make_plan(tiny_llama()), tiny_llama(), batches())
    better = calibrate_plan(make_plan(tiny_llama(), backend), tiny_llama(), batches(), alternations=alternations)
    assert divergence(better) < divergence(plain)


def test_a_second_adapter_shares_a_base_with_the_same_codes_only(tiny_llama):
    plan = calibrate_plan(make_plan(tiny_llama(), "gptq"), tiny_llama(), batches())
    model = apply(tiny_llama(), plan)
    model.add_adapter("same", AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
    other = [{"input_ids": torch.full((2, 16), 7)}]
    with pytest.raises(InvalidPlanError, match=r"quantized to .* bits already"):
        model.add_adapter(
            "other",
            AutoQRAConfig(
                plan=calibrate_plan(make_plan(tiny_llama(), "gptq"), tiny_llama(), other), task_type="CAUSAL_LM"
            ),
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alternations": -1}, CalibrationError, "alternations=-1 must be an integer"),
        ({"alternations": "2"}, CalibrationError, "alternations='2' must be an integer"),
        ({"rank": 500}, InvalidPlanError, "rank 500 of .* use at most 64"),
        ({"shapes": {NAME: (7, 64)}}, PlanMismatchError, r"shape \(7, 64\)"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(tiny_llama, monkeypatch, change, error, message):
    monkeypatch.setattr(calibrated_plan, "calibrate", lambda *_: pytest.fail("measured"))
    plan = BitRankPlan({NAME: LayerPlan(3, change.get("rank", 2))}, shapes=change.get("shapes"))
    with pytest.raises(error, match=message):
        calibrate_plan(plan, tiny_llama(), batches(), alternations=change.get("alternations", 0))


def test_a_module_without_adapter_that_is_decomposed_at_random(tiny_llama, monkeypatch):
    monkeypatch.setattr(compensation, "EXACT_SIDE", 8)
    monkeypatch.setattr(compensation, "_OVERSAMPLING", 2)
    plan = BitRankPlan({NAME: LayerPlan(3, 0), NAME.replace("q_", "o_"): LayerPlan(3, 4)})
    calibrated = calibrate_plan(plan, tiny_llama(), batches())
    assert list(calibrated.calibration.corrections) == [NAME.replace("q_", "o_")]


def test_corrections_that_float16_cannot_hold_are_refused(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(NAME.replace("q_", "v_")).weight.mul_(1e7)
    plan = BitRankPlan({NAME.replace("q_", "v_"): LayerPlan(2, 4)})
    with pytest.raises(CalibrationError, match="more than float16 can"):
        calibrate_plan(plan, model, batches())


def test_error_feedback_needs_a_calibrated_plan(tiny_llama):
    model = tiny_llama()
    with pytest.raises(InvalidPlanError, match="'gptq' needs a calibrated plan"):
        get_peft_model(model, AutoQRAConfig(bits=3, quant_backend="gptq", task_type="CAUSAL_LM"))
    assert len(linear_targets(model)) == 14  # none was swapped


def test_codes_of_another_size_are_refused(tiny_llama):
    plan = calibrate_plan(make_plan(tiny_llama(), "gptq"), tiny_llama(), batches())
    name = next(iter(plan))
    changed = plan.replace(layers={**plan, name: LayerPlan(8, 4)})
    model = tiny_llama()
    with pytest.raises(PlanMismatchError, match=f"codes and metadata of shapes .* for '{name}'"):
        apply(model, changed)
    assert len(linear_targets(model)) == 14
