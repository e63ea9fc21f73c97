"""Codes of 2, 3, 4 or 8 bits as bytes, without a gap."""

from __future__ import annotations

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


# Per width: the integer type that holds the codes of one word at a byte each, and the steps (mask, shift) that get
# them there: the masked upper half of every field moves up by `shift` bits, until each field is a byte with one code.
_SPREADS: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    2: (torch.int32, ((0xF0, 12), (0x000C000C, 6))),
    3: (torch.int64, ((0xFFF000, 20), (0x00000FC000000FC0, 10), (0x0038003800380038, 5))),
    4: (torch.int16, ((0xF0, 4),)),
}


def unpack_codes(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Undo :func:`pack_codes` by arithmetic on whole words, which the CPU's vector units do many at a time.

    Args:
        packed: uint8 ``[packed_num_bytes(num_codes, bits)]``.
        bits: 2, 3, 4 or 8.
        num_codes: how many codes were packed.

    Returns:
        uint8 ``[num_codes]``; for 8 bits ``packed`` itself.
    """
    if bits == 8:
        return packed
    word_dtype, steps = _SPREADS[bits]
    words = _words_of_three_bytes(packed) if bits == 3 else packed.to(word_dtype)
    for mask, shift in steps:
        # x - high + (high << shift), in one multiply-add.
        words = words.add_(words & mask, alpha=2**shift - 1)
    return words.view(torch.uint8)[:num_codes]


def _words_of_three_bytes(packed: Tensor) -> Tensor:
    """Each three bytes as one int64, ``[ceil(len(packed) / 3)]``."""
    padding = -packed.numel() % 3
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    triples = packed.view(-1, 3)
    words = torch.zeros(len(triples), dtype=torch.int64, device=packed.device)
    for byte in range(3):
        words.add_(triples[:, byte], alpha=2 ** (8 * byte))
    return words
