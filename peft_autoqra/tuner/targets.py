"""Which layers of a model a configuration quantizes or adapts, checked without reading a weight."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_autoqra.dense_layers import DENSE_LAYERS, dense_shape, dense_weight, is_dense_layer
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan
from peft_autoqra.plan_calibration import ModuleCalibration
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, layer_bits, make_backend
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.target_modules import check_no_fused_experts, check_untied
from peft_autoqra.tuner.config import COMPENSATE, AutoQRAConfig, exact_pattern
from peft_autoqra.tuner.layer import QuantLoRALinear
from peft_autoqra.tuner.patterns import inexact

_ADAPTABLE = (*DENSE_LAYERS, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """A base layer and what it shall become."""

    name: str
    layer: nn.Module
    wanted: LayerPlan

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        if isinstance(self.layer, QUANTIZED_LAYERS):
            return self.layer.out_features, self.layer.in_features
        return dense_shape(self.layer)

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``; dense layers only."""
        return dense_weight(self.layer)


def resolve_targets(model: nn.Module, config: AutoQRAConfig) -> list[Target]:
    """Every module that the configuration quantizes, adapts or names, checked; no weight is read.

    Args:
        model: the base model, on the meta device or not.
        config: its ``target_modules`` are expanded in place where they are ``"all-linear"``.

    Raises:
        PlanMismatchError: module names or shapes are not those the plan was made for.
        InvalidPlanError: a layer cannot be quantized as asked, or is quantized differently already.
    """
    if config.target_modules == "all-linear":
        check_no_fused_experts(model)
    include_all_linear_layers(config, model)
    targets = _resolve_targets(model, config)
    for target in targets:
        _check_target(target, config)
    check_untied(model, {target.name: target.layer for target in to_quantize(targets)})
    _check_parameters(model, targets, config)
    _check_weights_that_are_read(model, targets, config)
    check_not_saved_whole([target.name for target in targets if target.wanted.bits != DENSE_BITS], config)
    return targets


def include_all_linear_layers(config: LoraConfig, model: nn.Module) -> None:
    """Expand ``target_modules="all-linear"`` as PEFT does, and to the quantized layers, which PEFT does not know."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        expanded = copy.copy(config)
        if isinstance(config, AutoQRAConfig):
            expanded.task_type = "SEQ_CLS"  # leaves out classification heads, too
        config.target_modules = _maybe_include_all_linear_layers(expanded, model).target_modules
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        layers = base_layers(model).items()
        config.target_modules |= {n for n, m in layers if isinstance(m, QUANTIZED_LAYERS) and m is not head}


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module name to module, with tuner layers seen through and their inner parts left out."""
    layers: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.unmerged_layer if isinstance(module, QuantLoRALinear) else module.get_base_layer()
        layers[name] = module
    return layers


def _resolve_targets(model: nn.Module, config: AutoQRAConfig) -> list[Target]:
    layers = base_layers(model)
    if config.plan is not None:
        _check_names(config.plan, layers)
    targets = []
    matched = set()
    bits_keys, rank_keys = (matching_keys(patterns, layers) for patterns in (config.bits_pattern, config.rank_pattern))
    for name, layer in layers.items():
        bits_key, rank_key = bits_keys.get(name), rank_keys.get(name)
        found = check_target_module_exists(config, name)
        adapted = bool(found) and not isinstance(found, _ExcludedModule)
        named = config.plan is not None and name in config.plan
        quantized = isinstance(layer, QUANTIZED_LAYERS)  # by an earlier adapter; a reload has to do it as well
        matched.add(bits_key)
        if adapted:
            matched.add(rank_key)
        if adapted or named or quantized or (bits_key is not None and isinstance(layer, DENSE_LAYERS)):
            default_bits = layer_bits(layer) if quantized and not adapted else config.bits
            bits = default_bits if bits_key is None else config.bits_pattern[bits_key]
            rank = config.r if rank_key is None else config.rank_pattern[rank_key]
            targets.append(Target(name, layer, LayerPlan(bits, rank if adapted else 0)))
    _check_matches(targets, matched, layers, config)
    return targets


def matching_keys(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name to the key that decides it: its exact pattern, else the first that matches, as in PEFT.

    A plan has an exact pattern for each module; trying all on all would take minutes on a large model.

    Args:
        patterns: of a configuration.
        names: of modules; those that no key matches are left out of the result.
    """
    others = inexact(patterns)
    exact = {name: exact_pattern(name) for name in names}
    keys = {name: key if key in patterns else get_pattern_key(others, name) for name, key in exact.items()}
    return {name: key for name, key in keys.items() if key in patterns}


def _check_matches(
    targets: list[Target], matched: set[str | None], layers: Mapping[str, nn.Module], config: AutoQRAConfig
) -> None:
    """Every name and pattern has to match something."""
    wanted = config.target_modules
    found = _suffixes(layers)
    suffixes = [suffix for suffix in wanted if suffix not in found] if not isinstance(wanted, str) else []
    if suffixes or not (config.target_parameters or any(target.wanted.rank for target in targets)):
        raise InvalidPlanError(f"target_modules {suffixes or wanted} match no module; {_examples(layers)}")
    matched = matched | parameter_rank_patterns(layers, config).keys()
    for field in ("bits_pattern", "rank_pattern"):
        unmatched = sorted(set(getattr(config, field)) - matched)
        if unmatched:
            raise InvalidPlanError(
                f"{field} keys {unmatched[:3]} match no module, or none that an earlier key does not match already; "
                f"{_examples(layers)}"
            )


def parameter_rank_patterns(layers: Mapping[str, nn.Module], config: AutoQRAConfig) -> dict[str, int]:
    """The entries of ``rank_pattern`` that decide over ``target_parameters`` and not over modules."""
    keys = set(matching_keys(config.rank_pattern, _targeted_parameters(layers, config)).values())
    return {key: rank for key, rank in config.rank_pattern.items() if key in keys}


def _targeted_parameters(layers: Mapping[str, nn.Module], config: AutoQRAConfig) -> list[str]:
    wanted = set(config.target_parameters or ())
    if not wanted:
        return []
    names = [f"{name}.{own}" for name, layer in layers.items() for own, _ in layer.named_parameters(recurse=False)]
    return [name for name in names if not wanted.isdisjoint(_suffixes([name]))]


def _suffixes(names: Iterable[str]) -> set[str]:
    """Everything that ends a name: the whole and what follows each dot."""
    return {
        suffix for name in names for suffix in accumulate(reversed(name.split(".")), lambda end, part: f"{part}.{end}")
    }


def _examples(layers: Mapping[str, nn.Module]) -> str:
    names = [name for name, layer in layers.items() if isinstance(layer, (*DENSE_LAYERS, *QUANTIZED_LAYERS))]
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
    elif not is_dense_layer(layer):
        if wanted.bits == DENSE_BITS and isinstance(layer, _ADAPTABLE):
            weight = layer.weight
            _check_rank(name, (weight.shape[0], weight[0].numel()), wanted.rank)
            return
        raise InvalidPlanError(
            f"{name!r} is a {type(layer).__name__}; only nn.Linear and Conv1D can be quantized, and only linear, "
            "embedding and convolution layers take an adapter at bits=16. Exclude it from the plan or target modules, "
            "or load the base model without another quantization."
        )
    elif wanted.bits != DENSE_BITS:
        make_backend(config.quantizer).check(*target.shape, wanted.bits, module_calibration(target, config), name)
    check_shape_and_rank(name, target.shape, wanted, config.plan)
    _check_correction(target, config)


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
    _check_rank(name, shape, wanted.rank)


def _check_rank(name: str, shape: tuple[int, int], rank: int) -> None:
    if rank > min(shape):
        raise InvalidPlanError(
            f"rank {rank} of {name!r} is above the smaller side of its weight {shape}; use at most {min(shape)}."
        )


def _check_parameters(model: nn.Module, targets: list[Target], config: AutoQRAConfig) -> None:
    """Of ``target_parameters``: a quantized layer has no weight left that PEFT could adapt as a parameter."""
    layers = base_layers(model)
    for name in _targeted_parameters(layers, config):
        module_name, _, own_name = name.rpartition(".")
        key = get_pattern_key(config.rank_pattern, name)
        shape = getattr(layers[module_name], own_name).shape
        _check_rank(name, (shape[-2] if len(shape) > 1 else 1, shape[-1]), config.rank_pattern.get(key, config.r))
    quantized = [target.name for target in targets if target.wanted.bits != DENSE_BITS]
    weights = _suffixes(f"{name}.weight" for name in quantized)
    for key in config.target_parameters or ():
        if key in weights:
            raise InvalidPlanError(
                f"target_parameters names {key!r}, the weight of a layer that is quantized; name the layer in "
                "target_modules, or keep it at 16 bits."
            )


def check_not_saved_whole(quantized_names: Iterable[str], config: LoraConfig) -> None:
    """A module that is trained as a whole cannot hold quantized weights.

    Args:
        quantized_names: of the layers that are quantized, or will be.
        config: of the adapter.

    Raises:
        InvalidPlanError: such a layer is, or lies in, one of ``modules_to_save``.
    """
    for name in quantized_names:
        parents = _suffixes(accumulate(name.split("."), lambda start, part: f"{start}.{part}"))
        for key in config.modules_to_save or ():
            if key in parents:
                raise InvalidPlanError(
                    f"modules_to_save names {key!r}, to be trained as a whole, and {name!r} is quantized. Keep that "
                    "layer at 16 bits (in the plan or bits_pattern), or leave it out of modules_to_save."
                )


def _check_weights_that_are_read(model: nn.Module, targets: list[Target], config: AutoQRAConfig) -> None:
    """T5 and its kin, which keep ``wo`` in float32, cast its inputs to the dtype of its weight: bytes in NF4."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for target in targets:
        parent = target.name.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer):
            raise InvalidPlanError(
                f"{target.name!r} cannot be quantized or adapted: in evaluation torch's TransformerEncoderLayer reads "
                "the weights itself and passes its layers by, adapters included. Leave the module out."
            )
        nf4 = config.quant_backend == "bitsandbytes" and target.wanted.bits == NF4Linear.bits
        if nf4 and kept.intersection(target.name.split(".")):
            raise InvalidPlanError(
                f"{target.name!r} cannot be quantized to NF4: the model casts its inputs to the dtype of its weight. "
                f"Keep it at 8 bits (bits_pattern={{{target.name.rpartition('.')[2]!r}: 8}}) or 16, or use the native "
                "backend."
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


def to_quantize(targets: Iterable[Target]) -> list[Target]:
    """Lists no layer that is quantized already or stays dense."""
    return [t for t in targets if is_dense_layer(t.layer) and t.wanted.bits != DENSE_BITS]
