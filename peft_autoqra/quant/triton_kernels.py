"""CUDA kernels on packed weights, in Triton.

Checked against the PyTorch formula with Triton's interpreter on a CPU, in float32 and float16 (it truncates to
bfloat16 where a GPU rounds); neither run nor timed on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_autoqra.quant.quantized_weight import SUPERBLOCK_GROUPS, WeightFormat

_WEIGHTS_PER_PROGRAM = 1024
_ROWS_PER_PROGRAM = 4
_COLUMNS_PER_STEP = 512


@triton.jit
def _grid_value(scale_codes, base, group, kind_groups, kind_superblocks, superblock_groups: tl.constexpr, mask):
    """``minimum + step * code`` of groups, float32; the scales start at 0 of each tensor, the offsets at kind_*."""
    code = tl.load(scale_codes + kind_groups + group, mask=mask, other=0).to(tl.float32)
    superblock = 2 * (kind_superblocks + group // superblock_groups)
    minimum = tl.load(base + superblock, mask=mask, other=0.0).to(tl.float32)
    return minimum + tl.load(base + superblock + 1, mask=mask, other=0.0).to(tl.float32) * code


@triton.jit
def _decode(
    codes, scale_codes, base, index, mask, num_bytes, num_groups, num_superblocks,
    bits: tl.constexpr, group_size: tl.constexpr, superblock_groups: tl.constexpr,
):  # fmt: skip
    """Float32 weights at flat int64 positions; the arithmetic of ``quantized_weight.dequantize``."""
    bit = index * bits
    byte = bit // 8
    word = tl.load(codes + byte, mask=mask, other=0).to(tl.int32)
    if bits == 3:  # a code may reach into the next byte
        word |= tl.load(codes + byte + 1, mask=mask & (byte + 1 < num_bytes), other=0).to(tl.int32) << 8
    code = ((word >> (bit % 8).to(tl.int32)) & ((1 << bits) - 1)).to(tl.float32)
    group = index // group_size
    if bits == 8:
        scale = tl.load(base + group, mask=mask, other=0.0).to(tl.float32)
        weight = scale * (code - 128.0)
    else:
        scale = _grid_value(scale_codes, base, group, 0, 0, superblock_groups, mask)
        scale = (scale.to(tl.int32, bitcast=True) & -16).to(tl.float32, bitcast=True)
        offset = _grid_value(scale_codes, base, group, num_groups, num_superblocks, superblock_groups, mask)
        weight = scale * code + offset
    return weight


@triton.jit
def _dequantize_kernel(
    dense, codes, scale_codes, base, num_weights, num_bytes, num_groups, num_superblocks,
    bits: tl.constexpr, group_size: tl.constexpr, superblock_groups: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = index < num_weights
    weight = _decode(
        codes, scale_codes, base, index, mask, num_bytes, num_groups, num_superblocks,
        bits, group_size, superblock_groups,
    )  # fmt: skip
    tl.store(dense + index, weight.to(dense.dtype.element_ty), mask=mask)


@triton.jit
def _product_kernel(
    y, x, bias, codes, scale_codes, base, out_features, in_features, num_bytes, num_groups, num_superblocks,
    bits: tl.constexpr, group_size: tl.constexpr, superblock_groups: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((rows,), dtype=tl.float32)
    for start in range(0, in_features, columns):
        column = start + tl.arange(0, columns)
        mask = (row < out_features)[:, None] & (column < in_features)[None, :]
        weight = _decode(
            codes, scale_codes, base, row[:, None] * in_features + column[None, :], mask,
            num_bytes, num_groups, num_superblocks, bits, group_size, superblock_groups,
        )  # fmt: skip
        inputs = tl.load(x + token * in_features + column, mask=column < in_features, other=0.0)
        # Rounded as the dense weight is, so that only the order of summation differs from a dense product.
        weight = tl.where(mask, weight.to(inputs.dtype).to(tl.float32), 0.0)
        total += tl.sum(weight * inputs.to(tl.float32)[None, :], axis=1)
    if has_bias:
        total += tl.load(bias + row, mask=row < out_features, other=0.0).to(tl.float32)
    tl.store(y + token * out_features + row, total.to(y.dtype.element_ty), mask=row < out_features)


def _format_arguments(weight_format: WeightFormat) -> dict[str, int]:
    return {
        "num_bytes": weight_format.weight_bytes,
        "num_groups": weight_format.num_groups,
        "num_superblocks": -(-weight_format.num_groups // SUPERBLOCK_GROUPS),
        "bits": weight_format.bits,
        "group_size": weight_format.group_size,
        "superblock_groups": SUPERBLOCK_GROUPS,
    }


def dequantize(
    weight_format: WeightFormat, codes: Tensor, scale_codes: Tensor, scale_base: Tensor, dtype: torch.dtype
) -> Tensor:
    """Dense weight ``[out_features, in_features]`` in one kernel; equal to the PyTorch formula to the last bit."""
    dense = torch.empty(weight_format.out_features, weight_format.in_features, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(dense.numel(), _WEIGHTS_PER_PROGRAM),)
    with torch.cuda.device_of(codes):
        _dequantize_kernel[grid](
            dense,
            codes,
            scale_codes,
            scale_base.view(torch.bfloat16),
            dense.numel(),
            block=_WEIGHTS_PER_PROGRAM,
            **_format_arguments(weight_format),
        )
    return dense


def multiply_packed(
    weight_format: WeightFormat,
    codes: Tensor,
    scale_codes: Tensor,
    scale_base: Tensor,
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``x W^T + bias`` straight from the packed codes, for a handful of tokens; no dense weight is made.

    Sums run in float32 in another order than a dense product's.

    Args:
        weight_format: static description of the weight.
        codes: packed codes.
        scale_codes: codes of scales and offsets.
        scale_base: bytes of the second level.
        x: ``[..., in_features]``.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``, in the dtype of ``x``.
    """
    rows = x.reshape(-1, weight_format.in_features).contiguous()
    y = rows.new_empty(rows.shape[0], weight_format.out_features)
    grid = (triton.cdiv(weight_format.out_features, _ROWS_PER_PROGRAM), rows.shape[0])
    with torch.cuda.device_of(codes):
        _product_kernel[grid](
            y,
            rows,
            rows if bias is None else bias,
            codes,
            scale_codes,
            scale_base.view(torch.bfloat16),
            weight_format.out_features,
            weight_format.in_features,
            rows=_ROWS_PER_PROGRAM,
            columns=_COLUMNS_PER_STEP,
            has_bias=bias is not None,
            **_format_arguments(weight_format),
        )
    return y.view(*x.shape[:-1], weight_format.out_features)
