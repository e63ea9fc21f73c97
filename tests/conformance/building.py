"""Adapted models, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from peft_autoqra import AutoQRAConfig, BitRankPlan
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, dense_layer
from tests.conformance.models import ModelCase
from tests.tuner.synthetic import assert_unchanged, mixed_plan, randomize_adapters, snapshot


def planned(case: ModelCase, model: nn.Module, **changes: Any) -> BitRankPlan:
    """A plan with every bit-width, with adapters of several ranks and without."""
    return mixed_plan(model, case.target_modules, **changes)


def make_config(case: ModelCase, **settings: Any) -> AutoQRAConfig:
    """Three bits and rank 4 everywhere, unless settings say otherwise."""
    if "plan" not in settings:
        settings = {"bits": 3, "r": 4, "target_modules": case.target_modules} | settings
    return AutoQRAConfig(task_type=case.task_type, **settings)


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    """Whatever is refused in the block must leave the model as it was."""
    before = snapshot(model)
    try:
        yield
    except Exception:
        assert_unchanged(model, before)
        raise


def adapt(case: ModelCase, model: nn.Module | None = None, **settings: Any) -> PeftModel:
    """Quantize and adapt; where that is refused the model has to be as it was."""
    model = case.make() if model is None else model
    with unchanged_if_refused(model):
        return get_peft_model(model, make_config(case, **settings))


def trained(case: ModelCase, model: nn.Module | None = None, **settings: Any) -> PeftModel:
    """The same with adapters as if trained."""
    peft_model = adapt(case, model, **settings)
    randomize_adapters(peft_model)
    return peft_model.eval()


def outputs(case: ModelCase, model: nn.Module, **kwargs: Any) -> Tensor:
    """Logits in evaluation mode."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs().items()}
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs, **kwargs).logits
    return logits


def loss(case: ModelCase, model: nn.Module) -> Tensor:
    """Training loss on the case's batch."""
    value: Tensor = model(**case.batch()).loss
    return value


def adapter_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Module name in the base model to adapter layer."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, QUANTIZED_LAYERS)]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal but for the order of sums, relative to the largest value."""
    largest = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= tolerance * largest


def dense_reference(case: ModelCase, model: PeftModel) -> nn.Module:
    """A dense model with ``dequantize(W) + scaling B A`` computed here, of an unmerged model with one adapter."""
    reference = case.make()
    weights = dict(reference.named_parameters())
    base = model.get_base_model()
    with torch.no_grad():
        for name, module in base.named_modules():
            if name.endswith(".base_layer"):
                continue
            layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
            if not isinstance(layer, QUANTIZED_LAYERS) and not isinstance(module, LoraLayer):
                continue
            dense = dense_layer(layer) if isinstance(layer, QUANTIZED_LAYERS) else layer
            weight = dense.weight.clone()
            if isinstance(module, LoraLayer):
                delta = module.lora_B["default"].weight @ module.lora_A["default"].weight
                delta = delta * module.scaling["default"]
                weight += delta.T if type(dense).__name__ == "Conv1D" else delta
            weights[f"{name}.weight"].copy_(weight)
    return reference
