"""The native k-bit format: packed codes and double-quantized affine groups."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.quant.decoding import decode_groups, runs_here, workspace
from peft_autoqra.quant.packing import packed_num_bytes

SUPERBLOCK_GROUPS = 256
SYMMETRIC_BITS = 8
MIN_GROUP_SIZE = 8
HAS_TRITON = find_spec("triton") is not None
"""CUDA builds of PyTorch bring Triton; without it PyTorch's operations do the same work."""


@dataclass(frozen=True)
class WeightFormat:
    """Static description of a quantized weight: all that is needed beside its tensors.

    Attributes:
        bits: 2, 3, 4 (affine) or 8 (symmetric).
        group_size: weights along the input dimension that share a scale; divides ``in_features``.
        out_features: rows of the weight, N.
        in_features: columns of the weight, K.
    """

    bits: int
    group_size: int
    out_features: int
    in_features: int

    def decode(self, tensors: tuple[Tensor, ...], dtype: torch.dtype, *, temporary: bool = False) -> Tensor:
        """The dense weight, ``[out_features, in_features]``; see :func:`dequantize`."""
        codes, scale_codes, scale_base = tensors
        if codes.is_meta:
            return torch.empty((self.out_features, self.in_features), dtype=dtype, device="meta")
        out = workspace((self.out_features, self.in_features), dtype) if temporary and runs_here(codes) else None
        return dequantize(self, codes, scale_codes, scale_base, dtype, out=out)

    @property
    def num_groups(self) -> int:
        """Groups of the whole weight, G = N K / group_size."""
        return self.out_features * self.in_features // self.group_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed codes."""
        return packed_num_bytes(self.out_features * self.in_features, self.bits)

    @property
    def metadata_bytes(self) -> int:
        """Bytes of scales and zero points: 2 G + 8 ceil(G / 256), or 2 G for 8 bits."""
        if self.bits == SYMMETRIC_BITS:
            return 2 * self.num_groups
        return 2 * self.num_groups + 8 * -(-self.num_groups // SUPERBLOCK_GROUPS)


def fit_group_size(group_size: int, in_features: int, module_name: str) -> int:
    """Halve a group size until it divides the module's input size.

    Raises:
        InvalidPlanError: no group of at least 8 weights divides ``in_features``.
    """
    while in_features % group_size:
        group_size //= 2
    if group_size < MIN_GROUP_SIZE:
        raise InvalidPlanError(
            f"{module_name!r} has {in_features} input features, which no group of at least {MIN_GROUP_SIZE} weights "
            "divides; keep it at bits=16 or exclude it from the target modules."
        )
    return group_size


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight ``W ~ scale * q + offset`` per group.

    Every tensor has an integer dtype, so that ``module.to(dtype)`` cannot damage it.

    Attributes:
        format: bits, group size and shape.
        codes: packed codes q, uint8 ``[format.weight_bytes]``.
        scale_codes: 2-4 bits: uint8 ``[2, G]``, codes of the groups' scales and offsets; 8 bits: empty.
        scale_base: bfloat16 values kept as bytes, which every communication backend can send (int16 it cannot).
            2-4 bits: ``[2, ceil(G / 256), 4]``, (minimum, step) of the scale and offset codes of 256 groups; 8 bits:
            ``[2 G]``, the scales themselves.
    """

    format: WeightFormat
    codes: Tensor
    scale_codes: Tensor
    scale_base: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight, ``[out_features, in_features]``."""
        return dequantize(self.format, self.codes, self.scale_codes, self.scale_base, dtype)

    def dequantize_into(self, out: Tensor) -> Tensor:
        """Fill a contiguous ``[out_features, in_features]`` tensor with the dense weight, and return it."""
        if not runs_here(self.codes) or not runs_here(out):
            return out.copy_(self.to(out.device).dequantize(out.dtype))
        return dequantize(self.format, self.codes, self.scale_codes, self.scale_base, out.dtype, out=out)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device; itself where it is there already."""
        tensors = (self.codes, self.scale_codes, self.scale_base)
        return QuantizedWeight(self.format, *(tensor.to(device) for tensor in tensors))


def decode_scale_codes(scale_codes: Tensor, scale_base: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of the groups of a 2-4 bit weight, each float32 ``[G]``; scales with 20 significant bits."""
    num_groups, num_superblocks = scale_codes.shape[1], scale_base.shape[1]
    base = scale_base.view(torch.bfloat16).float()  # [2, S, 2]
    padding = num_superblocks * SUPERBLOCK_GROUPS - num_groups
    padded = torch.nn.functional.pad(scale_codes, (0, padding)) if padding else scale_codes
    blocks = padded.view(2, num_superblocks, SUPERBLOCK_GROUPS).float()
    # A product of 8 by 8 bits is exact in float32, so only the sum rounds, with or without FMA.
    values = base[..., :1] + base[..., 1:] * blocks
    scale, offset = values.view(2, -1)[:, :num_groups].unbind(0)
    # Without its last 4 bits the scale times a code of up to 4 bits is exact too, and ``scale * q + offset`` rounds
    # once: the weight is the same to the last bit on every device, fused or not, compiled or not.
    return (scale.view(torch.int32) & ~0xF).view(torch.float32), offset


def dequantize(
    weight_format: WeightFormat,
    codes: Tensor,
    scale_codes: Tensor,
    scale_base: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Dense weight of the three tensors of a :class:`QuantizedWeight`.

    The arithmetic is float32 whatever ``dtype`` is, so that the result in one dtype is the rounded result in another.

    Args:
        weight_format: bits, group size and shape.
        codes: as in :class:`QuantizedWeight`, like the next two.
        scale_codes: likewise.
        scale_base: likewise.
        dtype: of the result.
        out: see :func:`decode_groups`; ``[out_features, in_features]``.

    Returns:
        ``[out_features, in_features]``.
    """
    if runs_triton_kernels(codes):
        from peft_autoqra.quant import triton_kernels  # noqa: PLC0415 - optional dependency

        return triton_kernels.dequantize(weight_format, codes, scale_codes, scale_base, dtype)
    scale, offset = group_scales(weight_format.bits, scale_codes, scale_base)
    dense = decode_groups(
        codes,
        scale,
        offset,
        bits=weight_format.bits,
        group_size=weight_format.group_size,
        dtype=dtype,
        out=None if out is None else out.view(-1, weight_format.group_size),
    )
    return dense.view(weight_format.out_features, weight_format.in_features)


def runs_triton_kernels(tensor: Tensor) -> bool:
    """Whether Triton kernels work on this tensor: on CUDA, eagerly; a user's torch.compile makes its own kernels."""
    return tensor.is_cuda and HAS_TRITON and not torch.compiler.is_compiling()


def group_scales(bits: int, scale_codes: Tensor, scale_base: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of the groups of a weight of any bits, each float32 ``[G]``."""
    if bits == SYMMETRIC_BITS:
        scale = scale_base.view(torch.bfloat16).float()
        return scale, -128.0 * scale
    return decode_scale_codes(scale_codes, scale_base)
