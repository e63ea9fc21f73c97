"""Linear layer over a natively quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft_autoqra.quant.quantized_weight import QuantizedWeight, WeightFormat, dequantize, runs_triton_kernels

MAX_ROWS_OF_PACKED_PRODUCT = 4
"""Tokens up to which generation on CUDA multiplies by the packed codes instead of decoding the weight."""


class _QuantizedLinear(torch.autograd.Function):
    """``x @ W.T + b`` whose backward decodes W again instead of keeping it dense."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale_codes: Tensor,
        scale_base: Tensor,
        weight_format: WeightFormat,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale_codes, scale_base)
        ctx.weight_format = weight_format
        few_rows = x.numel() <= MAX_ROWS_OF_PACKED_PRODUCT * weight_format.in_features
        if few_rows and not any(ctx.needs_input_grad) and runs_triton_kernels(x):
            from peft_autoqra.quant import triton_kernels  # noqa: PLC0415 - optional dependency

            return triton_kernels.multiply_packed(weight_format, codes, scale_codes, scale_base, x, bias)
        return torch.nn.functional.linear(x, dequantize(weight_format, codes, scale_codes, scale_base, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            codes, scale_codes, scale_base = ctx.saved_tensors
            weight = dequantize(ctx.weight_format, codes, scale_codes, scale_base, output_gradient.dtype)
            input_gradient = output_gradient @ weight
        if ctx.needs_input_grad[1]:
            bias_gradient = output_gradient.reshape(-1, output_gradient.shape[-1]).sum(0)
        return input_gradient, bias_gradient, None, None, None, None


class QuantLinear(nn.Module):
    """Frozen ``y = x W^T + b`` with W in the native 2, 3, 4 or 8-bit format.

    The codes are frozen parameters and not buffers, which DDP would broadcast at every step. The name ``W_q`` makes
    PEFT treat the layer as it treats HQQ's.

    Args:
        weight: the quantized weight.
        bias: kept as it is; may be trained.
        compute_dtype: dtype that :meth:`dequantize` returns by default: that of the weight before, until
            ``module.to(dtype)`` changes it.

    Attributes:
        moment_digest: hash of the input moments that the codes were fitted with, None without; two adapters can share
            the layer only when both expect the same.

    Shape:
        input ``[..., in_features]`` -> output ``[..., out_features]``, in the dtype of the input (or of autocast).
    """

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        """Take over the tensors of ``weight``."""
        super().__init__()
        self.weight_format = weight.format
        self.compute_dtype = compute_dtype
        self.moment_digest: str | None = None
        self.W_q = nn.Parameter(weight.codes, requires_grad=False)
        self.scale_codes = nn.Parameter(weight.scale_codes, requires_grad=False)
        self.scale_base = nn.Parameter(weight.scale_base, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.weight_format.bits

    @property
    def in_features(self) -> int:
        """Input size K."""
        return self.weight_format.in_features

    @property
    def out_features(self) -> int:
        """Output size N."""
        return self.weight_format.out_features

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, ``[out_features, in_features]``, in ``dtype`` or the compute dtype."""
        return dequantize(self.weight_format, self.W_q, self.scale_codes, self.scale_base, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        output: Tensor = _QuantizedLinear.apply(  # type: ignore[no-untyped-call]
            x, bias, self.W_q, self.scale_codes, self.scale_base, self.weight_format
        )
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Let the compute dtype follow ``module.to(dtype)``, of which the integer tensors show nothing."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes and format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.weight_format.group_size}"
        )
