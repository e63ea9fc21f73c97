"""Layers without values, for a quantized checkpoint to fill."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peft_autoqra.dense_layers import as_linear, dense_shape, is_dense_layer
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import DENSE_BITS
from peft_autoqra.quant.decoded_linear import DecodedLinear
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.quantized_weight import QuantizedWeight, WeightFormat
from peft_autoqra.streaming.quant_config import QuantizedModule


def fitting_names(model: nn.Module, modules: Mapping[str, QuantizedModule]) -> dict[str, QuantizedModule]:
    """The modules by the names that this class of the model has: with or without its head they differ by a prefix."""
    layers = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if all(name in layers for name in modules) or prefix == ".":
        return dict(modules)
    if all(f"{prefix}{name}" in layers for name in modules):
        return {f"{prefix}{name}": module for name, module in modules.items()}
    return {name.removeprefix(prefix) if name not in layers else name: module for name, module in modules.items()}


def empty_dense_model(
    config: PretrainedConfig, make: Callable[[PretrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    """A model without values: parameters on the meta device, buffers as they are made.

    Args:
        config: of the model; a note on how it is quantized is left out.
        make: the model of a configuration, such as ``AutoModelForCausalLM.from_config``.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = make(config)
    model.tie_weights()
    return model.eval()


def put_empty_layers(model: nn.Module, modules: Mapping[str, QuantizedModule]) -> None:
    """Swap the linear layers below 16 bits on the meta device for quantized ones on the meta device.

    Args:
        model: on the meta device.
        modules: what config.json notes of the layers; those of 16 bits are checked only.

    Raises:
        PlanMismatchError: the model has no such linear layer, or one of another shape.
        InvalidPlanError: config.json describes a format that does not exist.
    """
    layers = dict(model.named_modules())
    for name, module in modules.items():
        layer = layers.get(name)
        if layer is None or not is_dense_layer(layer) or dense_shape(layer) != module.shape:
            close = difflib.get_close_matches(name, layers, n=3)
            raise PlanMismatchError(
                f"config.json says that {name!r} is a linear layer of shape {module.shape}, the model has "
                f"{_describe(layer)} there; close names: {close}. Save or download the model again."
            )
    for name, module in modules.items():
        if module.bits == DENSE_BITS:
            continue
        layer = layers[name]
        empty = _empty_layer(name, module, as_linear(layer))
        empty.dense_class = type(layer)
        model.set_submodule(name, empty.train(layer.training))


def _describe(layer: nn.Module | None) -> str:
    if layer is None:
        return "nothing"
    return type(layer).__name__ + (f" of shape {dense_shape(layer)}" if is_dense_layer(layer) else "")


def _empty_layer(name: str, module: QuantizedModule, linear: nn.Linear) -> DecodedLinear:
    group_size = module.group_size
    if group_size is None and module.bits == Int8Linear.bits:
        return Int8Linear(linear)
    if not isinstance(group_size, int) or group_size < 1 or module.shape[1] % group_size:
        raise InvalidPlanError(
            f"config.json gives {name!r} the group size {group_size!r}, which does not divide its "
            f"{module.shape[1]} inputs; save or download the model again."
        )
    weight_format = WeightFormat(module.bits, group_size, *module.shape)
    layer = QuantLinear(_empty_weight(weight_format), linear.bias, linear.weight.dtype)
    layer.calibration_digest = module.calibration_digest
    return layer


def _empty_weight(weight_format: WeightFormat) -> QuantizedWeight:
    """The tensors that ``quantize_affine`` makes, without values."""
    tensors = (torch.empty(shape, dtype=torch.uint8, device="meta") for shape in weight_format.tensor_shapes)
    return QuantizedWeight(weight_format, *tensors)
