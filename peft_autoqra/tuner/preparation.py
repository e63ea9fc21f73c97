"""Quantizing the base model in place: everything is checked before the first layer is swapped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.integrations import _skip_init_on_device
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.fingerprint import fingerprint_weights
from peft_autoqra.plan import DENSE_BITS, BaseModelInfo, BitRankPlan, LayerPlan
from peft_autoqra.plan_calibration import ModuleCalibration
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, layer_bits, make_backend
from peft_autoqra.target_modules import check_untied
from peft_autoqra.tuner.config import COMPENSATE, AutoQRAConfig, exact_pattern

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


@dataclass(frozen=True)
class Target:
    """A base layer and what it shall become."""

    name: str
    layer: nn.Module
    wanted: LayerPlan

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.layer.out_features, self.layer.in_features  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``; dense layers only."""
        return self.layer.weight  # type: ignore[return-value]


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
    for target, _ in to_quantize(targets):
        _check_values(target)
    _check_no_adapter_would_change(model, targets)
    if config.calibration_digest is not None and config.calibration is None:
        raise InvalidPlanError(
            "The configuration was made with a calibration that it has lost; read it with PeftConfig.from_pretrained, "
            "and change its values in place."
        )
    fingerprint = _check_fingerprint(model, targets, config, earlier_configs)
    _swap_all(model, targets, config)
    _record_exact_patterns(targets, config)
    return _resolved_plan(targets, config, fingerprint)


def resolve_targets(model: nn.Module, config: AutoQRAConfig) -> list[Target]:
    """Every module that the configuration quantizes, adapts or names, checked; no weight is read.

    Args:
        model: the base model, on the meta device or not.
        config: its ``target_modules`` are expanded in place where they are ``"all-linear"``.

    Raises:
        PlanMismatchError: module names or shapes are not those the plan was made for.
        InvalidPlanError: a layer cannot be quantized as asked, or is quantized differently already.
    """
    include_all_linear_layers(config, model)
    targets = _resolve_targets(model, config)
    for target in targets:
        _check_target(target, config)
    check_untied(model, {target.name: layer for target, layer in to_quantize(targets)})
    return targets


def include_all_linear_layers(config: LoraConfig, model: nn.Module) -> None:
    """Expand ``target_modules="all-linear"`` as PEFT does, and to the quantized layers, which PEFT does not know."""
    shorthand = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    if shorthand:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        layers = _base_layers(model).items()
        config.target_modules |= {n for n, m in layers if isinstance(m, QUANTIZED_LAYERS) and m is not head}


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


def _resolve_targets(model: nn.Module, config: AutoQRAConfig) -> list[Target]:
    layers = _base_layers(model)
    if config.plan is not None:
        _check_names(config.plan, layers)
    targets = []
    matched = set()
    bits_keys, rank_keys = (
        _matching_keys(patterns, layers) for patterns in (config.bits_pattern, config.rank_pattern)
    )
    for name, layer in layers.items():
        bits_key, rank_key = bits_keys.get(name), rank_keys.get(name)
        found = check_target_module_exists(config, name)
        adapted = bool(found) and not isinstance(found, _ExcludedModule)
        named = config.plan is not None and name in config.plan
        quantized = isinstance(layer, QUANTIZED_LAYERS)  # by an earlier adapter; a reload has to do it as well
        matched.add(bits_key)
        if adapted:
            matched.add(rank_key)
        if adapted or named or quantized or (bits_key is not None and isinstance(layer, nn.Linear)):
            default_bits = layer_bits(layer) if quantized and not adapted else config.bits
            bits = default_bits if bits_key is None else config.bits_pattern[bits_key]
            rank = config.r if rank_key is None else config.rank_pattern[rank_key]
            targets.append(Target(name, layer, LayerPlan(bits, rank if adapted else 0)))
    _check_matches(targets, matched, layers, config)
    return targets


def _matching_keys(patterns: Mapping[str, int], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Module name to the key that decides it: its exact pattern, else the first that matches, as in PEFT.

    A plan has an exact pattern for each module; trying all on all would take minutes on a large model.
    """
    exact = {name: key for name in layers if (key := exact_pattern(name)) in patterns}
    exact_keys = set(exact.values())
    others = [key for key in patterns if key not in exact_keys]
    keys = {name: exact.get(name) or get_pattern_key(others, name) for name in layers}
    return {name: key for name, key in keys.items() if key in patterns}


def _check_matches(
    targets: list[Target], matched: set[str | None], layers: Mapping[str, nn.Module], config: AutoQRAConfig
) -> None:
    """Every name and pattern has to match something."""
    wanted = config.target_modules
    suffixes = [s for s in wanted if not _is_suffix_of_any(s, layers)] if not isinstance(wanted, str) else []
    if suffixes or not (config.target_parameters or any(target.wanted.rank for target in targets)):
        raise InvalidPlanError(f"target_modules {suffixes or wanted} match no module; {_examples(layers)}")
    for field in ("bits_pattern", "rank_pattern"):
        unmatched = sorted(set(getattr(config, field)) - matched)
        if unmatched:
            raise InvalidPlanError(
                f"{field} keys {unmatched[:3]} match no module, or none that an earlier key does not match already; "
                f"{_examples(layers)}"
            )


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


def _check_target(target: Target, config: AutoQRAConfig) -> None:
    """Everything that could go wrong with one layer."""
    name, layer, wanted = target.name, target.layer, target.wanted
    if isinstance(layer, QUANTIZED_LAYERS):
        if not make_backend(config.quantizer).could_have_made(
            layer, wanted.bits, module_calibration(target, config), name
        ):
            raise InvalidPlanError(
                f"{name!r} is quantized to {layer_bits(layer)} bits already, and not as the new adapter wants: "
                f"{wanted.bits} bits, {config.quantizer}, {'with' if config.calibration_digest else 'without'} "
                "calibration. Use the same settings, or load the base model again."
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
        make_backend(config.quantizer).check(*target.shape, wanted.bits, module_calibration(target, config), name)
    check_shape_and_rank(name, target.shape, wanted, config.plan)
    _check_correction(target, config)


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


def module_calibration(target: Target, config: AutoQRAConfig) -> ModuleCalibration | None:
    """What calibration found of a layer; None without."""
    return config.calibration.module(target.name) if config.calibration else None


def check_shape_and_rank(name: str, shape: tuple[int, int], wanted: LayerPlan, plan: BitRankPlan | None) -> None:
    """Whether a layer is the one that a plan was made for, and can have its rank.

    Raises:
        PlanMismatchError: the plan says another shape.
        InvalidPlanError: the rank is above the smaller side.
    """
    if plan is not None and plan.shapes.get(name, shape) != shape:
        raise PlanMismatchError(
            f"The plan was made for a weight of shape {plan.shapes[name]} at {name!r}, the model has {shape}; use the "
            f"base model that the plan names ({plan.base_model.name_or_path})."
        )
    if wanted.rank > min(shape):
        raise InvalidPlanError(
            f"rank {wanted.rank} of {name!r} is above the smaller side of its weight {shape}; use at most "
            f"{min(shape)}."
        )


def _check_correction(target: Target, config: AutoQRAConfig) -> None:
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


def _check_no_adapter_would_change(model: nn.Module, targets: list[Target]) -> None:
    new = [target.name for target in targets if type(target.layer) is nn.Linear and target.wanted.bits != DENSE_BITS]
    if new and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InvalidPlanError(
            f"The model has adapters already, and quantizing {new[:3]} would change what they compute. Keep these "
            "modules at bits=16, or load the base model again and add this adapter first."
        )


def _check_fingerprint(
    model: nn.Module, targets: list[Target], config: AutoQRAConfig, earlier_configs: Sequence[AutoQRAConfig]
) -> str | None:
    """Fingerprint of the base weights; the known one where the base is quantized already."""
    if all(type(target.layer) is nn.Linear for target in targets):
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
        for target, layer in to_quantize(targets):
            quantized = backend.quantize(layer, target.wanted.bits, module_calibration(target, config), target.name)
            replace_layer(model, target.name, quantized.train(layer.training))


def to_quantize(targets: Iterable[Target]) -> list[tuple[Target, nn.Linear]]:
    """Lists no layer that is quantized already or stays dense."""
    return [(t, t.layer) for t in targets if type(t.layer) is nn.Linear and t.wanted.bits != DENSE_BITS]


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


def _resolved_plan(targets: list[Target], config: AutoQRAConfig, fingerprint: str | None) -> BitRankPlan:
    layers = {target.name: target.wanted for target in targets}
    shapes = {target.name: target.shape for target in targets if hasattr(target.layer, "in_features")}
    if config.plan is not None:
        base_model = replace(config.plan.base_model, fingerprint=fingerprint)
        return config.plan.replace(layers=layers, shapes=shapes, base_model=base_model)
    return BitRankPlan(
        layers,
        shapes=shapes,
        quantizer=config.quantizer,
        base_model=BaseModelInfo(name_or_path=config.base_model_name_or_path, fingerprint=fingerprint),
        calibration=config.calibration,
    )
