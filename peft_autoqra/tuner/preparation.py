"""Quantizing the base model in place: everything is checked before the first layer is swapped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.integrations import _skip_init_on_device
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.fingerprint import fingerprint_weights
from peft_autoqra.plan import DENSE_BITS, BaseModelInfo, BitRankPlan, LayerPlan
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, layer_bits, make_backend
from peft_autoqra.tuner.config import COMPENSATE, AutoQRAConfig

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


@dataclass(frozen=True)
class _Target:
    """A base layer and what it shall become."""

    name: str
    layer: nn.Module
    wanted: LayerPlan

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.layer.out_features, self.layer.in_features  # type: ignore[return-value]


def quantize_base(model: nn.Module, config: AutoQRAConfig) -> BitRankPlan:
    """Swap the configured linear layers of a model for quantized ones, in place.

    Layers that already have the wanted bits stay as they are, so a second adapter can share the base.

    Args:
        model: the base model.
        config: what to quantize; its ``target_modules`` are expanded in place where they are ``"all-linear"``.

    Returns:
        The resolved plan: every quantized or adapted module with its shape.

    Raises:
        PlanMismatchError: module names, shapes or weights are not those the plan was made for.
        InvalidPlanError: a layer cannot be quantized as asked, or is quantized differently already.
    """
    _maybe_include_all_linear_layers(config, model)
    targets = _resolve_targets(model, config)
    for target in targets:
        _check_target(target, config)
    fingerprint = _check_fingerprint(targets, config)
    _swap_all(model, targets, config)
    return _resolved_plan(targets, config, fingerprint)


def _base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module name to module, with tuner layers seen through and their inner parts left out."""
    layers: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        layers[name] = module
    return layers


def _resolve_targets(model: nn.Module, config: AutoQRAConfig) -> list[_Target]:
    layers = _base_layers(model)
    if config.plan is not None:
        _check_names(config.plan, layers)
    targets = []
    matched_patterns = set()
    for name, layer in layers.items():
        bits_key = get_pattern_key(config.bits_pattern.keys(), name)
        has_own_bits = bits_key in config.bits_pattern
        adapted = check_target_module_exists(config, name)
        adapted = bool(adapted) and not isinstance(adapted, _ExcludedModule)
        if has_own_bits:
            matched_patterns.add(bits_key)
        named = config.plan is not None and name in config.plan
        if adapted or named or (has_own_bits and isinstance(layer, (nn.Linear, *QUANTIZED_LAYERS))):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            bits = config.bits_pattern.get(bits_key, config.bits)
            targets.append(_Target(name, layer, LayerPlan(bits, rank if adapted else 0)))
    _check_matches(targets, matched_patterns, layers, config)
    return targets


def _check_matches(
    targets: list[_Target], matched_patterns: set[str], layers: Mapping[str, nn.Module], config: AutoQRAConfig
) -> None:
    """Every name and pattern has to match something."""
    wanted = config.target_modules
    suffixes = [] if isinstance(wanted, str) else [s for s in wanted if not _is_suffix_of_any(s, layers)]
    if suffixes or not (config.target_parameters or any(target.wanted.rank for target in targets)):
        raise InvalidPlanError(f"target_modules {suffixes or wanted} match no module; {_examples(layers)}")
    unmatched = sorted(set(config.bits_pattern) - matched_patterns)
    if unmatched:
        raise InvalidPlanError(f"bits_pattern keys {unmatched[:3]} match no module; {_examples(layers)}")


def _is_suffix_of_any(suffix: str, names: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for name in names)


def _examples(layers: Mapping[str, nn.Module]) -> str:
    names = [name for name, layer in layers.items() if isinstance(layer, (nn.Linear, *QUANTIZED_LAYERS))]
    return f"linear layers have names such as {names[:3]}."


def _check_names(plan: BitRankPlan, layers: Mapping[str, nn.Module]) -> None:
    missing = [name for name in plan if name not in layers]
    if missing:
        close = difflib.get_close_matches(missing[0], layers, n=3, cutoff=0.5)
        raise PlanMismatchError(
            f"The plan names {len(missing)} modules that the model does not have, such as {missing[0]!r}"
            + (f"; close names of the model: {close}. " if close else ". ")
            + "Was the plan made for another model?"
        )


def _check_target(target: _Target, config: AutoQRAConfig) -> None:
    """Everything that could go wrong with one layer."""
    name, layer, wanted = target.name, target.layer, target.wanted
    if isinstance(layer, QUANTIZED_LAYERS):
        if layer_bits(layer) != wanted.bits:
            raise InvalidPlanError(
                f"{name!r} is quantized to {layer_bits(layer)} bits already, the new adapter wants {wanted.bits}; "
                "load the base model again, or use the same bits."
            )
    elif type(layer) is not nn.Linear:
        if wanted.bits == DENSE_BITS and isinstance(layer, _ADAPTABLE):
            return
        raise InvalidPlanError(
            f"{name!r} is a {type(layer).__name__}; only nn.Linear can be quantized, and only linear, embedding and "
            "convolution layers take an adapter at bits=16. Exclude it from the plan or target modules, or load the "
            "base model without another quantization."
        )
    elif wanted.bits != DENSE_BITS:
        make_backend(config.quantizer).num_bytes(*target.shape, wanted.bits, name)
        _check_values(target)
        _check_moment(target, config)
    _check_shape_and_rank(target, config)
    _check_correction(target, config)


def _check_values(target: _Target) -> None:
    weight = target.layer.weight
    if weight.device.type == "meta":
        raise InvalidPlanError(f"The weight of {target.name!r} is on the meta device; load the model's weights first.")
    if not torch.isfinite(weight).all():
        raise InvalidPlanError(f"The weight of {target.name!r} holds NaN or infinite values; it cannot be quantized.")


def _check_moment(target: _Target, config: AutoQRAConfig) -> None:
    moment = config.calibration.input_second_moments.get(target.name) if config.calibration else None
    if moment is not None and moment.shape != target.shape[1:]:
        raise PlanMismatchError(
            f"The calibration of {target.name!r} is for an input of shape {moment.shape}, the model has "
            f"{target.shape[1:]}; use the base model that was calibrated."
        )
    if moment is not None and not (np.isfinite(moment).all() and (moment >= 0).all()):
        raise InvalidPlanError(
            f"The calibration of {target.name!r} holds input moments that are negative or not finite; calibrate again."
        )


def _check_shape_and_rank(target: _Target, config: AutoQRAConfig) -> None:
    name, wanted = target.name, target.wanted
    if config.plan is not None and config.plan.shapes.get(name, target.shape) != target.shape:
        raise PlanMismatchError(
            f"The plan was made for a weight of shape {config.plan.shapes[name]} at {name!r}, the model has "
            f"{target.shape}; use the base model that the plan names ({config.plan.base_model.name_or_path})."
        )
    if wanted.rank > min(target.shape):
        raise InvalidPlanError(
            f"rank {wanted.rank} of {name!r} is above the smaller side of its weight {target.shape}; "
            f"use at most {min(target.shape)}."
        )


def _check_correction(target: _Target, config: AutoQRAConfig) -> None:
    name, wanted = target.name, target.wanted
    if config.init_lora_weights != COMPENSATE or not wanted.rank or wanted.bits == DENSE_BITS:
        return
    correction = config.calibration.corrections.get(name) if config.calibration else None
    if correction is None or correction.rank < wanted.rank:
        raise InvalidPlanError(
            f"The calibration holds no correction of rank {wanted.rank} for {name!r}; calibrate the plan again "
            "with peft_autoqra.calibrate_plan(...)."
        )
    shape = (correction.left.shape[0], correction.right.shape[1])
    if shape != target.shape:
        raise PlanMismatchError(
            f"The calibration corrects a weight of shape {shape} at {name!r}, the model has {target.shape}; use the "
            "base model that was calibrated."
        )


def _check_fingerprint(targets: list[_Target], config: AutoQRAConfig) -> str | None:
    """Fingerprint of the base weights; the known one where the base is quantized already."""
    if any(type(target.layer) is not nn.Linear for target in targets):
        return config.base_fingerprint
    weights = [(target.name, target.layer.weight) for target in targets]
    fingerprint = fingerprint_weights(weights)
    if config.base_fingerprint not in (None, fingerprint):
        raise PlanMismatchError(
            f"The base weights have fingerprint {fingerprint}, the plan or adapter was made for "
            f"{config.base_fingerprint}. Load the same base model and revision in the same dtype; to use it on these "
            "weights all the same, set base_fingerprint=None (plan.replace(base_model=BaseModelInfo()))."
        )
    return fingerprint


def _swap_all(model: nn.Module, targets: list[_Target], config: AutoQRAConfig) -> None:
    backend = make_backend(config.quantizer)
    moments = config.calibration.input_second_moments if config.calibration else {}
    with _skip_init_on_device():
        for target in targets:
            if type(target.layer) is not nn.Linear or target.wanted.bits == DENSE_BITS:
                continue
            moment = torch.from_numpy(moments[target.name]) if target.name in moments else None
            quantized = backend.quantize(target.layer, target.wanted.bits, moment, target.name)
            replace_layer(model, target.name, quantized.train(target.layer.training))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one called ``name``; under a tuner layer where there is one."""
    parent_name, _, child_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    child = getattr(parent, child_name)
    if isinstance(child, BaseTunerLayer):
        child.base_layer = layer
    else:
        setattr(parent, child_name, layer)


def _resolved_plan(targets: list[_Target], config: AutoQRAConfig, fingerprint: str | None) -> BitRankPlan:
    if config.plan is not None:
        info = config.plan.base_model
        return config.plan.replace(
            base_model=BaseModelInfo(name_or_path=info.name_or_path, revision=info.revision, fingerprint=fingerprint)
        )
    return BitRankPlan(
        {target.name: target.wanted for target in targets},
        shapes={target.name: target.shape for target in targets if hasattr(target.layer, "in_features")},
        quantizer=config.quantizer,
        base_model=BaseModelInfo(name_or_path=config.base_model_name_or_path, fingerprint=fingerprint),
        calibration=config.calibration,
    )
