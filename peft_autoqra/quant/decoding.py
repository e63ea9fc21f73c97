"""Packed codes to dense weights with PyTorch's own operations, on any device."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from peft_autoqra.quant import compiled_decode
from peft_autoqra.quant.packing import unpack_codes

CHUNK_WEIGHTS_PER_THREAD = 2**19
"""Weights that a thread decodes at a time: with their intermediate values they stay in a core's cache, and there are
few enough chunks that threads do not wait for each other much."""

_workspaces = threading.local()


def decode_groups(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Weights ``scale * q + offset`` of all groups, in float32 and then rounded once to ``dtype``.

    Args:
        codes: packed, uint8 ``[ceil(G * group_size * bits / 8)]``.
        scale: float32 ``[G]``.
        offset: float32 ``[G]``.
        bits: 2, 3, 4 or 8.
        group_size: weights per scale.
        dtype: of the result.
        out: where to put the result, contiguous ``[G, group_size]``, on the CPU; from :func:`workspace` for one that
            is used up before the next, which may be compiled for. None takes fresh memory.

    Returns:
        ``[G, group_size]``; the same to the last bit whichever way it is computed.
    """
    shape = (scale.numel(), group_size)
    # A user's torch.compile fuses the plain operations with what stands around them; a subclass may not be real.
    if not runs_here(codes):
        values = unpack_codes(codes, bits, scale.numel() * group_size).view(shape)
        return (values.float() * scale[:, None] + offset[:, None]).to(dtype)
    dense = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
    compile_it = out is not None and compiled_decode.compiles(dense.numel())
    if not (compile_it and compiled_decode.decode_compiled(dense, codes, scale, offset, bits, group_size)):
        _decode_in_chunks(dense, codes, scale, offset, bits)
    return dense


def runs_here(tensor: Tensor) -> bool:
    """Whether a weight is decoded on the CPU, now, into real memory: not traced, not fake."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)


def _decode_in_chunks(dense: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> None:
    """Fill ``dense``; all steps of one chunk run before it leaves the CPU's cache."""
    group_size = dense.shape[1]
    # Eight groups end on a whole byte, whatever the bits.
    chunk_groups = max(8, CHUNK_WEIGHTS_PER_THREAD * torch.get_num_threads() // group_size // 8 * 8)
    chunk_bytes = chunk_groups * group_size * bits // 8
    buffer = torch.empty(min(chunk_groups, len(dense)), group_size, dtype=torch.float32, device="cpu")
    per_group = (tensor.split(chunk_groups) for tensor in (dense, scale[:, None], offset[:, None]))
    for target, chunk_scale, chunk_offset, chunk in zip(*per_group, codes.split(chunk_bytes), strict=True):
        values = unpack_codes(chunk, bits, target.numel()).view(target.shape)
        target.copy_(buffer[: len(target)].copy_(values).mul_(chunk_scale).add_(chunk_offset))


def workspace(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """This thread's one buffer on the CPU, ``shape``; as large as the largest that was asked for.

    The next call gives the same memory. Fresh memory for every weight would cost as much as decoding it.
    """
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    buffer = getattr(_workspaces, "buffer", None)
    if buffer is None or buffer.numel() < num_bytes:
        with torch.inference_mode(False):  # made there, it could not be written to anywhere else
            buffer = _workspaces.buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return buffer[:num_bytes].view(dtype).view(shape)
