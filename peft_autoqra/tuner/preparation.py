"""Quantizing the base model in place: everything is checked before the first layer is swapped."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import _skip_init_on_device
from torch import Tensor, nn

from peft_autoqra.dense_layers import DENSE_LAYERS, is_dense_layer
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.fingerprint import fingerprint_weights
from peft_autoqra.plan import BaseModelInfo, BitRankPlan
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, make_backend, quantize_layer
from peft_autoqra.target_modules import fused_experts, share_of_weights
from peft_autoqra.tuner.config import AutoQRAConfig, exact_pattern
from peft_autoqra.tuner.target_checks import resolve_targets
from peft_autoqra.tuner.targets import (
    Target,
    base_layers,
    module_calibration,
    parameter_rank_patterns,
    to_quantize,
)


def quantize_base(
    model: nn.Module, config: AutoQRAConfig, earlier_configs: Sequence[AutoQRAConfig] = ()
) -> BitRankPlan:
    """Swap the configured linear layers of a model for quantized ones, in place.

    Layers that already have the wanted bits stay as they are, so a second adapter can share the base.

    Args:
        model: the base model.
        config: what to quantize; its ``target_modules`` are expanded in place where they are ``"all-linear"``.
        earlier_configs: of the adapters that the model has already.

    Returns:
        The resolved plan: every quantized or adapted module with its shape.

    Raises:
        PlanMismatchError: module names, shapes or weights are not those the plan was made for.
        InvalidPlanError: a layer cannot be quantized as asked, or is quantized differently already.
    """
    targets = resolve_targets(model, config)
    for target in to_quantize(targets):
        _check_values(target)
    _check_no_adapter_would_change(model, targets)
    if config.calibration_digest is not None and config.calibration is None:
        raise InvalidPlanError(
            "The configuration was made with a calibration that it has lost; read it with PeftConfig.from_pretrained, "
            "and change its values in place."
        )
    fingerprint = _check_fingerprint(model, targets, config, earlier_configs)
    base_model = _base_model_info(model, config, fingerprint)
    of_parameters = parameter_rank_patterns(base_layers(model), config)
    if to_quantize(targets):
        _warn_of_fused_experts(model)
    _swap_all(model, targets, config)
    _record_exact_patterns(targets, config)
    config.rank_pattern |= of_parameters
    if config.base_model_name_or_path in (None, getattr(model, "name_or_path", None)):  # not: read with another base
        config.base_is_quantized = _was_read_quantized(model)
    return _resolved_plan(targets, config, base_model)


def _was_read_quantized(model: nn.Module) -> bool:
    """Whether the files of the model hold codes, as opposed to weights that were quantized once or while loading."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return (
        quantizer is not None and quantizer.pre_quantized and quantizer.quantization_config.quant_method == "autoqra"
    )


def _warn_of_fused_experts(model: nn.Module) -> None:
    experts = fused_experts(model)
    if experts:
        warnings.warn(
            f"The experts that the model keeps in fused parameters, such as {next(iter(experts))!r}, stay at 16 bits: "
            f"{share_of_weights(experts, model):.0%} of all weights.",
            stacklevel=2,
        )


def _check_values(target: Target) -> None:
    weight = target.weight
    if weight.device.type == "meta":
        raise InvalidPlanError(f"The weight of {target.name!r} is on the meta device; load the model's weights first.")
    check_finite(target.name, weight)


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized.

    Raises:
        InvalidPlanError: it holds values that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise InvalidPlanError(f"The weight of {name!r} holds NaN or infinite values; it cannot be quantized.")


def _check_no_adapter_would_change(model: nn.Module, targets: list[Target]) -> None:
    new = [target.name for target in to_quantize(targets)]
    if new and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InvalidPlanError(
            f"The model has adapters already, and quantizing {new[:3]} would change what they compute. Keep these "
            "modules at bits=16, or load the base model again and add this adapter first."
        )


def _check_fingerprint(
    model: nn.Module, targets: list[Target], config: AutoQRAConfig, earlier_configs: Sequence[AutoQRAConfig]
) -> str | None:
    """Fingerprint of the base weights; the known one where the base is quantized already."""
    if all(is_dense_layer(target.layer) for target in targets):
        fingerprint: str | None = fingerprint_weights((target.name, target.weight) for target in targets)
    else:
        names = {target.name for target in targets}
        same_modules = (
            earlier for earlier in earlier_configs if earlier.plan is not None and names == set(earlier.plan)
        )
        known = _recorded_fingerprint(model, names) or config.base_fingerprint
        fingerprint = next((earlier.base_fingerprint for earlier in same_modules), known)
    check_fingerprint(fingerprint, config)
    return fingerprint


def _recorded_fingerprint(model: nn.Module, names: set[str]) -> str | None:
    """What a base that was quantized while it was loaded notes about its weights."""
    record: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    return record.fingerprint_of(names) if hasattr(record, "fingerprint_of") else None


def check_fingerprint(fingerprint: str | None, config: AutoQRAConfig) -> None:
    """Refuse base weights that the plan or adapter was not made for.

    Raises:
        PlanMismatchError: the configuration names another fingerprint.
    """
    if config.base_fingerprint not in (None, fingerprint):
        raise PlanMismatchError(
            f"The base weights have fingerprint {fingerprint}, the plan or adapter was made for "
            f"{config.base_fingerprint}. Load the same base model and revision in the same dtype; to use it on these "
            "weights all the same, set base_fingerprint=None (plan.replace(base_model=BaseModelInfo()))."
        )


def _swap_all(model: nn.Module, targets: list[Target], config: AutoQRAConfig) -> None:
    backend = make_backend(config.quantizer)
    with _skip_init_on_device():
        for target in to_quantize(targets):
            calibration = module_calibration(target, config)
            quantized = quantize_layer(backend, target.layer, target.wanted.bits, calibration, target.name)
            replace_layer(model, target.name, quantized)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one called ``name``; under a tuner layer where there is one."""
    parent_name, _, child_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    child = getattr(parent, child_name)
    if isinstance(child, BaseTunerLayer):
        child.base_layer = layer
    else:
        setattr(parent, child_name, layer)


def _record_exact_patterns(targets: list[Target], config: AutoQRAConfig) -> None:
    """Keep what each module got: PEFT sorts patterns when it saves, which changes what overlapping ones mean."""
    config.bits_pattern = {exact_pattern(target.name): target.wanted.bits for target in targets}
    config.rank_pattern = {
        exact_pattern(target.name): target.wanted.rank for target in targets if target.wanted.rank not in (0, config.r)
    }


def _base_model_info(model: nn.Module, config: AutoQRAConfig, fingerprint: str | None) -> BaseModelInfo:
    if config.plan is not None:
        known = config.plan.base_model
    else:
        known = BaseModelInfo(name_or_path=config.base_model_name_or_path)
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return replace(known, fingerprint=fingerprint, revision=known.revision or revision)


def _resolved_plan(targets: list[Target], config: AutoQRAConfig, base_model: BaseModelInfo) -> BitRankPlan:
    layers = {target.name: target.wanted for target in targets}
    shapes = {
        target.name: target.shape for target in targets if isinstance(target.layer, (*DENSE_LAYERS, *QUANTIZED_LAYERS))
    }
    if config.plan is not None:
        return config.plan.replace(layers=layers, shapes=shapes, base_model=base_model)
    return BitRankPlan(
        layers,
        shapes=shapes,
        quantizer=config.quantizer,
        base_model=base_model,
        calibration=config.calibration,
    )
