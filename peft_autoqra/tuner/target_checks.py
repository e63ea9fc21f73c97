"""Whether the layers that a configuration names can become what it wants; no weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn

from peft_autoqra.dense_layers import DENSE_LAYERS, is_dense_layer
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, layer_bits, make_backend
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.target_modules import check_no_fused_experts, check_untied, is_all_linear
from peft_autoqra.tuner.config import COMPENSATE, AutoQRAConfig
from peft_autoqra.tuner.targets import (
    Target,
    base_layers,
    find_targets,
    include_all_linear_layers,
    module_calibration,
    suffixes,
    targeted_parameters,
    to_quantize,
)

_ADAPTABLE = (*DENSE_LAYERS, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def resolve_targets(model: nn.Module, config: AutoQRAConfig) -> list[Target]:
    """Every module that the configuration quantizes, adapts or names, checked; no weight is read.

    Args:
        model: the base model, on the meta device or not.
        config: its ``target_modules`` are expanded in place where they are ``"all-linear"``.

    Raises:
        PlanMismatchError: module names or shapes are not those the plan was made for.
        InvalidPlanError: a layer cannot be quantized as asked, or is quantized differently already.
    """
    if is_all_linear(config.target_modules):
        check_no_fused_experts(model)
    include_all_linear_layers(config, model)
    targets = find_targets(model, config)
    for target in targets:
        _check_target(target, config)
    check_untied(model, {target.name: target.layer for target in to_quantize(targets)})
    _check_parameters(model, targets, config)
    _check_weights_that_are_read(model, targets, config)
    check_not_saved_whole([target.name for target in targets if target.wanted.bits != DENSE_BITS], config)
    return targets


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
    if not config.target_parameters:
        return
    layers = base_layers(model)
    for name in targeted_parameters(layers, config):
        module_name, _, own_name = name.rpartition(".")
        key = get_pattern_key(config.rank_pattern, name)
        shape = getattr(layers[module_name], own_name).shape
        _check_rank(name, (shape[-2] if len(shape) > 1 else 1, shape[-1]), config.rank_pattern.get(key, config.r))
    quantized = [target.name for target in targets if target.wanted.bits != DENSE_BITS]
    weights = suffixes(f"{name}.weight" for name in quantized)
    for key in config.target_parameters:
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
    wanted = set(config.modules_to_save or ())
    for name in quantized_names if wanted else ():
        parents = suffixes(accumulate(name.split("."), lambda start, part: f"{start}.{part}"))
        for key in sorted(wanted & parents):
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
