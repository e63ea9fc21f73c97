"""Unquantized linear layers: ``nn.Linear`` and transformers' ``Conv1D``, which stores its weight transposed."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DenseLayer: TypeAlias = Any
"""An ``nn.Linear`` or ``Conv1D``."""
DENSE_LAYERS = (nn.Linear, Conv1D)


def is_dense_layer(module: nn.Module) -> bool:
    """Whether a module is one of these layers and no subclass, which may compute anything."""
    return type(module) in DENSE_LAYERS


def dense_shape(layer: DenseLayer) -> tuple[int, int]:
    """(out_features, in_features)."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def dense_weight(layer: DenseLayer) -> Tensor:
    """The weight as ``[out_features, in_features]``, detached, not copied; of a ``Conv1D`` not contiguous."""
    weight: Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def set_dense_weight(layer: DenseLayer, weight: Tensor) -> None:
    """Let a layer use another weight, ``[out_features, in_features]``; not copied."""
    layer.weight.data = weight.T if isinstance(layer, Conv1D) else weight


def as_linear(layer: DenseLayer) -> nn.Linear:
    """The layer as an ``nn.Linear`` that shares its tensors."""
    return layer if isinstance(layer, nn.Linear) else make_dense_layer(nn.Linear, dense_weight(layer), layer.bias)


def make_dense_layer(layer_class: type, weight: Tensor, bias: nn.Parameter | None) -> DenseLayer:
    """A layer with these tensors; its weight is frozen.

    Args:
        layer_class: ``nn.Linear`` or ``Conv1D``.
        weight: ``[out_features, in_features]``; copied for a ``Conv1D`` only.
        bias: ``[out_features]``, taken over; a ``Conv1D`` always has one.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    if layer_class is nn.Linear:
        return linear
    layer = Conv1D(0, 0)
    layer.nf, layer.nx = weight.shape
    layer.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    layer.bias = bias if bias is not None else nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    return layer
