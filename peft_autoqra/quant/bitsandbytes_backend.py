"""The backend that makes bitsandbytes' formats."""

from __future__ import annotations

from torch import nn

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.plan_calibration import ModuleCalibration
from peft_autoqra.quant.int8 import SCALE_BYTES, Int8Linear
from peft_autoqra.quant.nf4 import NF4_BLOCK, NF4_CODEBOOK_BYTES, NF4_NESTED_BLOCK, NF4Linear


class BitsAndBytesBackend:
    """NF4 with double quantization for 4 bits, row-wise int8 for 8; calibration is not used.

    Args:
        settings: nothing of them is used.
    """

    def __init__(self, settings: QuantizerSettings) -> None:
        """Block sizes are bitsandbytes' own."""
        del settings

    def quantize(
        self, linear: nn.Linear, bits: int, calibration: ModuleCalibration | None, name: str
    ) -> NF4Linear | Int8Linear:
        """The quantized layer."""
        del calibration
        self.num_bytes(linear.out_features, linear.in_features, bits, name)
        return NF4Linear(linear) if bits == NF4Linear.bits else Int8Linear(linear)

    def check(
        self, out_features: int, in_features: int, bits: int, calibration: ModuleCalibration | None, name: str
    ) -> None:
        """Bits alone."""
        del calibration
        self.num_bytes(out_features, in_features, bits, name)

    def could_have_made(self, layer: nn.Module, bits: int, calibration: ModuleCalibration | None, name: str) -> bool:
        """By type and bits."""
        del calibration, name
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
