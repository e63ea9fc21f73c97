"""Ways to quantize a linear layer, behind one small interface."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import DENSE_BITS, QuantizerSettings
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.int8 import SCALE_BYTES, Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.nf4 import NF4_BLOCK, NF4_CODEBOOK_BYTES, NF4_NESTED_BLOCK, NF4Linear
from peft_autoqra.quant.packing import NATIVE_BITS
from peft_autoqra.quant.quantized_weight import WeightFormat, fit_group_size

QuantizedLayer = QuantLinear | NF4Linear | Int8Linear
"""What a backend makes; each has ``bits``, ``bias`` and ``dequantize``."""
QUANTIZED_LAYERS = (QuantLinear, NF4Linear, Int8Linear)
"""The same for ``isinstance``."""


class QuantBackend(Protocol):
    """Quantizes linear layers and knows their bytes beforehand."""

    def quantize(self, linear: nn.Linear, bits: int, input_second_moment: Tensor | None, name: str) -> QuantizedLayer:
        """The quantized layer; ``linear`` stays as it is."""
        ...

    def could_have_made(self, layer: nn.Module, bits: int, input_second_moment: Tensor | None, name: str) -> bool:
        """Whether ``layer`` is what :meth:`quantize` makes with these arguments of some dense layer."""
        ...

    def num_bytes(self, out_features: int, in_features: int, bits: int, name: str) -> tuple[int, int]:
        """Bytes of (codes, metadata) that :meth:`quantize` will make.

        Raises:
            InvalidPlanError: the backend cannot quantize this shape to these bits.
        """
        ...


class NativeBackend:
    """The package's own 2, 3, 4 and 8-bit format.

    Args:
        group_size: weights per scale; halved per module until it divides the input size.
    """

    def __init__(self, group_size: int) -> None:
        """Keep the wanted group size."""
        self.group_size = group_size

    def quantize(self, linear: nn.Linear, bits: int, input_second_moment: Tensor | None, name: str) -> QuantLinear:
        """The quantized layer."""
        group_size = fit_group_size(self.group_size, linear.in_features, name)
        with torch.no_grad():
            weight = quantize_affine(
                linear.weight, bits=bits, group_size=group_size, input_second_moment=input_second_moment
            )
        layer = QuantLinear(weight, linear.bias, linear.weight.dtype)
        layer.moment_digest = _digest(input_second_moment)
        return layer

    def could_have_made(self, layer: nn.Module, bits: int, input_second_moment: Tensor | None, name: str) -> bool:
        """By type, bits, group size and calibration."""
        return (
            isinstance(layer, QuantLinear)
            and layer.bits == bits
            and layer.weight_format.group_size == fit_group_size(self.group_size, layer.in_features, name)
            and layer.moment_digest == _digest(input_second_moment)
        )

    def num_bytes(self, out_features: int, in_features: int, bits: int, name: str) -> tuple[int, int]:
        """Bytes of (codes, metadata)."""
        if bits not in NATIVE_BITS:
            raise InvalidPlanError(f"bits={bits} of {name!r} has no native format; choose one of {NATIVE_BITS} or 16.")
        weight_format = WeightFormat(
            bits, fit_group_size(self.group_size, in_features, name), out_features, in_features
        )
        return weight_format.weight_bytes, weight_format.metadata_bytes


class BitsAndBytesBackend:
    """bitsandbytes' formats: NF4 with double quantization for 4 bits, row-wise int8 for 8; calibration is not used."""

    def quantize(
        self, linear: nn.Linear, bits: int, input_second_moment: Tensor | None, name: str
    ) -> NF4Linear | Int8Linear:
        """The quantized layer."""
        del input_second_moment
        self.num_bytes(linear.out_features, linear.in_features, bits, name)
        return NF4Linear(linear) if bits == NF4Linear.bits else Int8Linear(linear)

    def could_have_made(self, layer: nn.Module, bits: int, input_second_moment: Tensor | None, name: str) -> bool:
        """By type and bits."""
        del input_second_moment, name
        return isinstance(layer, NF4Linear | Int8Linear) and layer.bits == bits

    def num_bytes(self, out_features: int, in_features: int, bits: int, name: str) -> tuple[int, int]:
        """Bytes of (codes, metadata).

        NF4: per 64 weights one byte of scale, per 256 scales 4 bytes, codebooks. Int8: 4 bytes of scale per row.

        Raises:
            InvalidPlanError: neither 4 nor 8 bits.
        """
        num_weights = out_features * in_features
        if bits == NF4Linear.bits:
            num_blocks = -(-num_weights // NF4_BLOCK)
            nested = 4 * -(-num_blocks // NF4_NESTED_BLOCK)
            offset_bytes = 4
            return -(-num_weights // 2), num_blocks + nested + offset_bytes + NF4_CODEBOOK_BYTES
        if bits == Int8Linear.bits:
            return num_weights, SCALE_BYTES * out_features
        raise InvalidPlanError(
            f"bits={bits} of {name!r}: the bitsandbytes backend has 4 bits (NF4) and 8 bits (int8); use 4, 8 or 16 "
            "bits, or the native backend."
        )


def _digest(moment: Tensor | None) -> str | None:
    return None if moment is None else hashlib.sha256(moment.float().cpu().numpy().tobytes()).hexdigest()[:16]


def make_backend(settings: QuantizerSettings) -> QuantBackend:
    """The backend of a plan's quantizer settings."""
    if settings.backend == "bitsandbytes":
        return BitsAndBytesBackend()
    return NativeBackend(settings.group_size)


def dense_linear(layer: QuantizedLayer) -> nn.Linear:
    """An ``nn.Linear`` with the dequantized weight of a quantized layer and a copy of its bias."""
    weight = layer.dequantize()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return linear.train(layer.training)


def layer_bits(layer: nn.Module) -> int:
    """Bits of a layer's weight; 16 for anything not quantized by this package."""
    return layer.bits if isinstance(layer, QUANTIZED_LAYERS) else DENSE_BITS
