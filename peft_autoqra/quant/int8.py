"""Linear layer over bitsandbytes' row-wise int8 weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_autoqra.quant.decoded_linear import DecodedLinear

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


class RowwiseInt8:
    """The format: codes and one scale a row."""

    def decode(self, tensors: tuple[Tensor, ...], dtype: torch.dtype, *, temporary: bool = False) -> Tensor:
        """The dense weight, ``[out_features, in_features]``; always in memory of its own."""
        del temporary
        codes, scale_bytes = tensors
        return dequantize_rows(codes, scale_bytes, dtype)


class Int8Linear(DecodedLinear):
    """Frozen ``y = x W^T + b`` with W in the int8 format of bitsandbytes' ``Linear8bitLt``, quantized at construction.

    It computes with the decoded weight on every device, in training and evaluation alike. ``Linear8bitLt`` does so in
    training on CPUs only; in evaluation, and on CUDA always, it quantizes the activations too (LLM.int8()), so that a
    merged model is another one than was trained. Between its two modes on a CPU outputs differ by 0.8% for normal
    inputs, by 5.5% where one input feature is 40 times as large and no threshold sets it apart (1024 x 1024,
    bitsandbytes 0.50.2). This layer takes as little memory, and has no int8 matrix product and no threshold.

    Args:
        linear: the layer to quantize; its bias is taken over.

    Attributes:
        W_q: bitsandbytes' CB, int8 ``[out_features, in_features]``.
        scale_bytes: bitsandbytes' SCB as bytes, uint8 ``[4 out_features]``: ``module.to(dtype)`` cannot round them.

    Shape:
        input ``[..., in_features]`` -> output ``[..., out_features]``, in the dtype of the input (or of autocast).
    """

    bits = 8
    W_q: nn.Parameter
    scale_bytes: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize the weight on the device it is on."""
        codes, row_max = quantize_rows(linear.weight.detach())
        tensors = {"W_q": codes, "scale_bytes": row_max.view(torch.uint8)}
        super().__init__(RowwiseInt8(), tensors, linear.bias, linear.weight.dtype)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{super().extra_repr()}, bits={self.bits}"
