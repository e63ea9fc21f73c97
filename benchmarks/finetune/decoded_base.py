"""Training on a CPU with quantized weights decoded once."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from peft import PeftModel
from torch import Tensor, nn

from peft_autoqra.dense_layers import make_dense_layer
from peft_autoqra.quant.backends import QUANTIZED_LAYERS


def decode_base(model: PeftModel) -> None:
    """Replace every quantized linear layer by a frozen dense one with the decoded weight, in place.

    The quantized layers decode their weights at every pass and multiply by them as the dense ones do, so nothing but
    time and memory changes: losses and gradients are the same to the last bit where the base is bfloat16.

    Args:
        model: with layers of this package, or bitsandbytes' ``Linear4bit``. Its ``Linear8bitLt`` has no dense equal,
            since it quantizes activations too.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, (bnb.nn.Linear4bit, *QUANTIZED_LAYERS)):
                setattr(parent, name, make_dense_layer(nn.Linear, _decoded_weight(layer), layer.bias))


def _decoded_weight(layer: Any) -> Tensor:
    """``[out_features, in_features]``."""
    if isinstance(layer, QUANTIZED_LAYERS):
        return layer.dequantize()
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
