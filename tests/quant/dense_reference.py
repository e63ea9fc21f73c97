"""What every layer with a decoded weight has to compute: what a dense layer with that weight does."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from peft_autoqra.quant.decoded_linear import DecodedLinear


def assert_computes_as_dense(layer: DecodedLinear, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward and input gradient to the last bit."""
    weight = layer.dequantize(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    output = layer(x)
    assert output.dtype == dtype
    assert torch.equal(output, linear(x, weight, layer.bias))
    gradient = torch.randn_like(output)
    output.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient @ weight)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, gradient.reshape(-1, layer.out_features).sum(0))
