"""Plans for the tiny model, made without any search, and ways to compare models exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_autoqra.dense_layers import dense_shape, dense_weight
from peft_autoqra.fingerprint import fingerprint_weights
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import Correction, PlanCalibration
from peft_autoqra.target_modules import linear_targets

BITS, RANKS = (2, 3, 4, 8, 16), (4, 0, 8, 1)
TOKENS = torch.arange(24).view(2, 12) * 5 % 128


def mixed_plan(model: nn.Module, target_modules: str | list[str] = "all-linear", **changes: Any) -> BitRankPlan:
    """Every bit-width, with and without an adapter; it knows shapes and fingerprint of the model."""
    targets = linear_targets(model, target_modules)
    layers = {
        name: LayerPlan(BITS[index % len(BITS)], RANKS[index % len(RANKS)]) for index, name in enumerate(targets)
    }
    arguments: dict[str, Any] = {
        "layers": layers,
        "shapes": {name: dense_shape(layer) for name, layer in targets.items()},
        "quantizer": QuantizerSettings(group_size=32),
        "base_model": BaseModelInfo(
            fingerprint=fingerprint_weights((name, dense_weight(layer)) for name, layer in targets.items())
        ),
    }
    return BitRankPlan(**(arguments | changes))


def random_calibration(model: nn.Module, plan: BitRankPlan) -> PlanCalibration:
    """Moments and corrections of the right shapes, far from zero."""
    rng = np.random.default_rng(0)
    corrections = {}
    for name, layer in plan.items():
        rows, columns = plan.shapes[name]
        if layer.rank and layer.bits < 16:
            corrections[name] = Correction(
                left=(0.1 * rng.standard_normal((rows, layer.rank))).astype(np.float16),
                right=(0.1 * rng.standard_normal((layer.rank, columns))).astype(np.float16),
            )
    moments = {name: 0.01 + rng.random(plan.shapes[name][1], dtype=np.float32) ** 4 for name in plan}
    return PlanCalibration(input_second_moments=moments, corrections=corrections)


def calibrated_plan(model: nn.Module) -> BitRankPlan:
    """The mixed plan with a calibration and the initialization that uses it."""
    plan = mixed_plan(model, initialization="compensate")
    return plan.replace(calibration=random_calibration(model, plan))


def randomize_adapters(model: nn.Module, seed: int = 0, adapter_name: str = "") -> None:
    """As if trained: no LoRA matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and adapter_name in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module) -> Tensor:
    """In evaluation mode, on fixed tokens."""
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Types of all modules and values of all tensors, to see whether anything changed."""
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "flags": flags,
        "tensors": tensors,
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["types"] == before["types"]
    assert after["flags"] == before["flags"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name].nan_to_num(7), tensor.nan_to_num(7)), name
