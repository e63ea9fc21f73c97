"""Codes of 2, 3, 4 or 8 bits as bytes, without a gap."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

NATIVE_BITS = (2, 3, 4, 8)


def packed_num_bytes(num_codes: int, bits: int) -> int:
    """Bytes that :func:`pack_codes` makes of ``num_codes`` codes."""
    return -(-num_codes * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes little-endian: code ``i`` takes bits ``i * bits`` and up of the byte stream.

    Args:
        codes: uint8, any shape, values below ``2**bits``; read in row-major order.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 ``[packed_num_bytes(codes.numel(), bits)]``.
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    codes_per_word = 8 if bits == 3 else 8 // bits
    bytes_per_word = codes_per_word * bits // 8
    padding = -flat.numel() % codes_per_word
    words = torch.nn.functional.pad(flat, (0, padding)).view(-1, codes_per_word).to(torch.int32)
    shifts = torch.arange(codes_per_word, dtype=torch.int32, device=flat.device) * bits
    packed = (words << shifts).sum(dim=1, dtype=torch.int32)
    byte_shifts = torch.arange(bytes_per_word, dtype=torch.int32, device=flat.device) * 8
    as_bytes = ((packed[:, None] >> byte_shifts) & 0xFF).to(torch.uint8).reshape(-1)
    return as_bytes[: packed_num_bytes(flat.numel(), bits)].clone()


def _code_table(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All codes that one table index holds, ``[2**index_bits, codes_per_index]``.

    An index is one byte, for 3 bits the 12 bits that hold four codes.
    """
    index_bits = 12 if bits == 3 else 8
    # Built outside inference mode: a table that a generate() call happened to build must also serve training.
    with torch.inference_mode(False):
        shifts = torch.arange(index_bits // bits, device=device) * bits
        indices = torch.arange(2**index_bits, device=device)
        codes: Tensor = (indices[:, None] >> shifts) & (2**bits - 1)
        return codes.to(dtype)


_cached_code_table = lru_cache(maxsize=64)(_code_table)


def unpack_codes(packed: Tensor, bits: int, num_codes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Undo :func:`pack_codes` by table look-up.

    Args:
        packed: uint8 ``[packed_num_bytes(num_codes, bits)]``.
        bits: 2, 3, 4 or 8.
        num_codes: how many codes were packed.
        dtype: of the result; a floating dtype saves the caller a conversion.

    Returns:
        ``[num_codes]``.
    """
    if bits == 8:
        return packed.to(dtype)
    if bits == 3:
        triples = torch.nn.functional.pad(packed, (0, -packed.numel() % 3)).view(-1, 3).to(torch.int32)
        low = triples[:, 0] | ((triples[:, 1] & 0xF) << 8)
        high = (triples[:, 1] >> 4) | (triples[:, 2] << 4)
        indices = torch.stack((low, high), dim=1).reshape(-1)
    else:
        indices = packed.to(torch.int32)
    # torch.compile warns of lru_cache, and takes the table into its graph anyhow.
    make_table = _code_table if torch.compiler.is_compiling() else _cached_code_table
    table = make_table(bits, packed.device, dtype)
    return table.index_select(0, indices).reshape(-1)[:num_codes]
