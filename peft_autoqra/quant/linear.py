"""Linear layer over a natively quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_autoqra.quant.decoded_linear import DecodedLinear
from peft_autoqra.quant.quantized_weight import QuantizedWeight, WeightFormat, runs_triton_kernels

MAX_ROWS_OF_PACKED_PRODUCT = 4
"""Tokens up to which generation on CUDA multiplies by the packed codes instead of decoding the weight."""


class QuantLinear(DecodedLinear):
    """Frozen ``y = x W^T + b`` with W in the native 2, 3, 4 or 8-bit format.

    Args:
        weight: the quantized weight.
        bias: kept as it is; may be trained.
        compute_dtype: dtype that :meth:`dequantize` returns by default: that of the weight before, until
            ``module.to(dtype)`` changes it.

    Attributes:
        W_q: packed codes; ``scale_codes`` and ``scale_base`` as in :class:`QuantizedWeight`.
        calibration_digest: hash of what the codes were fitted with beside the weight, None where that is nothing; two
            adapters can share the layer only when both expect the same.

    Shape:
        input ``[..., in_features]`` -> output ``[..., out_features]``, in the dtype of the input (or of autocast).
    """

    decoder: WeightFormat
    W_q: nn.Parameter
    scale_codes: nn.Parameter
    scale_base: nn.Parameter

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        """Take over the tensors of ``weight``."""
        tensors = {"W_q": weight.codes, "scale_codes": weight.scale_codes, "scale_base": weight.scale_base}
        super().__init__(weight.format, tensors, bias, compute_dtype)
        self.calibration_digest: str | None = None

    @property
    def weight_format(self) -> WeightFormat:
        """Bits, group size and shape."""
        return self.decoder

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.decoder.bits

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Input size K."""
        return self.decoder.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Output size N."""
        return self.decoder.out_features

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        few_rows = x.shape[-1] == self.in_features and x.numel() <= MAX_ROWS_OF_PACKED_PRODUCT * self.in_features
        if few_rows and runs_triton_kernels(x) and not (torch.is_grad_enabled() and _any_needs_gradient(x, bias)):
            from peft_autoqra.quant import triton_kernels  # noqa: PLC0415 - optional dependency

            return triton_kernels.multiply_packed(self.decoder, self.W_q, self.scale_codes, self.scale_base, x, bias)
        return super()._product(x, bias)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.decoder.group_size}"


def _any_needs_gradient(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
