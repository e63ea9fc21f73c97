"""Packed codes to dense weights with PyTorch's own operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_autoqra.quant import compiled_decode
from peft_autoqra.quant.packing import unpack_codes

CHUNK_WEIGHTS_PER_THREAD = 2**19
"""Weights that a thread decodes at a time. 2**17 would fit a core's second-level cache and takes about 10% less CPU
time, but every operation ends with the threads waiting for each other, which on a busy machine costs far more."""


def decode_groups(
    codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Weights ``scale * q + offset`` of all groups, in float32 and then rounded once to ``dtype``.

    Args:
        codes: packed, uint8 ``[ceil(G * group_size * bits / 8)]``.
        scale: float32 ``[G]``.
        offset: float32 ``[G]``.
        bits: 2, 3, 4 or 8.
        group_size: weights per scale.
        dtype: of the result.

    Returns:
        ``[G, group_size]``; the same to the last bit whichever way it is computed.
    """
    # A user's torch.compile fuses the plain operations with what stands around them.
    if torch.compiler.is_compiling() or codes.device.type != "cpu":
        return compiled_decode.decode_whole(codes, scale, offset, bits, group_size, dtype)
    if compiled_decode.is_enabled():
        return compiled_decode.decode_compiled(codes, scale, offset, bits, group_size, dtype)
    return _decode_in_chunks(codes, scale, offset, bits, group_size, dtype)


def _decode_in_chunks(
    codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """As :func:`decode_groups`; all steps of one chunk run before it leaves the CPU's cache."""
    dense = torch.empty(scale.numel(), group_size, dtype=dtype, device=codes.device)
    # Eight groups end on a whole byte, whatever the bits.
    chunk_groups = max(8, CHUNK_WEIGHTS_PER_THREAD * torch.get_num_threads() // group_size // 8 * 8)
    chunk_bytes = chunk_groups * group_size * bits // 8
    buffer = torch.empty(min(chunk_groups, scale.numel()), group_size, device=codes.device)
    per_group = (tensor.split(chunk_groups) for tensor in (dense, scale[:, None], offset[:, None]))
    for target, chunk_scale, chunk_offset, chunk in zip(*per_group, codes.split(chunk_bytes), strict=True):
        values = unpack_codes(chunk, bits, target.numel()).view(target.shape)
        target.copy_(buffer[: len(target)].copy_(values).mul_(chunk_scale).add_(chunk_offset))
    return dense
