"""Linear layer over bitsandbytes' row-wise int8 weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

INT8_MAX = 127
SCALE_BYTES = 4
"""Bytes of a row's scale."""
SMALLEST_DIVISOR = 1e-36
"""127 divided by less overflows float32."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``CB = round(127 W / SCB)`` with SCB the largest magnitude of each row: ``int8_vectorwise_quant``.

    Written out here, since bitsandbytes' own takes only float16 on CUDA, and divides by zero in a row of zeros. The
    arithmetic is float32 on every device; ``Linear8bitLt`` rounds a float32 weight to float16 first.

    Args:
        weight: ``[out_features, in_features]``, of any floating dtype.

    Returns:
        CB, int8 ``[out_features, in_features]``, and SCB, float32 ``[out_features]``.
    """
    weight = weight.float()
    row_max = weight.abs().amax(dim=1)
    inverse = INT8_MAX / row_max.clamp_min(SMALLEST_DIVISOR)
    return (weight * inverse[:, None]).round_().to(torch.int8), row_max


def dequantize_rows(codes: Tensor, scale_bytes: Tensor, dtype: torch.dtype) -> Tensor:
    """``CB * SCB / 127``, rounded once to ``dtype``, as ``Linear8bitLt`` does it for its backward pass.

    Args:
        codes: int8 ``[out_features, in_features]``.
        scale_bytes: uint8 ``[4 out_features]``, the bytes of SCB.
        dtype: of the result; int8 values are exact in every floating dtype, and the product is float32.

    Returns:
        ``[out_features, in_features]``.
    """
    return codes.to(dtype).mul_((scale_bytes.view(torch.float32) * (1.0 / INT8_MAX))[:, None])


class _RowwiseLinear(torch.autograd.Function):
    """``x @ W.T + b`` whose backward decodes W again instead of keeping it dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scale_bytes: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale_bytes)
        return torch.nn.functional.linear(x, dequantize_rows(codes, scale_bytes, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            codes, scale_bytes = ctx.saved_tensors
            input_gradient = output_gradient @ dequantize_rows(codes, scale_bytes, output_gradient.dtype)
        if ctx.needs_input_grad[1]:
            bias_gradient = output_gradient.reshape(-1, output_gradient.shape[-1]).sum(0)
        return input_gradient, bias_gradient, None, None


class Int8Linear(nn.Module):
    """Frozen ``y = x W^T + b`` with W in the int8 format of bitsandbytes' ``Linear8bitLt``, quantized at construction.

    It computes with the decoded weight on every device, in training and evaluation alike. ``Linear8bitLt`` does so in
    training on CPUs only; in evaluation, and on CUDA always, it quantizes the activations too (LLM.int8()), so that a
    merged model is another one than was trained. Between its two modes on a CPU outputs differ by 0.8% for normal
    inputs, by 5.5% where one input feature is 40 times as large and no threshold sets it apart (1024 x 1024,
    bitsandbytes 0.50.2). This layer takes as little memory, and has no int8 matrix product and no threshold.

    Codes and scales are frozen parameters and not buffers, which DDP would broadcast at every step. The name ``W_q``
    makes PEFT treat the layer as it treats HQQ's.

    Args:
        linear: the layer to quantize; its bias is taken over.

    Attributes:
        W_q: bitsandbytes' CB, int8 ``[out_features, in_features]``.
        scale_bytes: bitsandbytes' SCB as bytes, uint8 ``[4 out_features]``: ``module.to(dtype)`` cannot round them.

    Shape:
        input ``[..., in_features]`` -> output ``[..., out_features]``, in the dtype of the input (or of autocast).
    """

    bits = 8
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize the weight on the device it is on."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype
        codes, row_max = quantize_rows(linear.weight.detach())
        self.W_q = nn.Parameter(codes, requires_grad=False)
        self.scale_bytes = nn.Parameter(row_max.view(torch.uint8), requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, ``[out_features, in_features]``, in ``dtype`` or the compute dtype."""
        return dequantize_rows(self.W_q, self.scale_bytes, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        output: Tensor = _RowwiseLinear.apply(x, bias, self.W_q, self.scale_bytes)  # type: ignore[no-untyped-call]
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Let the compute dtype follow ``module.to(dtype)``, of which the integer tensors show nothing."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes and format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}"
        )
