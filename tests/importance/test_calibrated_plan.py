"""Plans calibrated for their own bits and ranks, and what they give once applied, saved and loaded."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_autoqra import AutoQRAConfig, BitRankPlan, LayerPlan, QuantizerSettings, calibrate_plan
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.target_modules import linear_targets


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
    with pytest.raises(PlanMismatchError, match=f"bytes of codes and metadata for '{name}'"):
        apply(model, changed)
    assert len(linear_targets(model)) == 14
