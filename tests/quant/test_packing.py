"""Packing against a bit string written out in pure Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_autoqra.quant.packing import NATIVE_BITS, pack_codes, packed_num_bytes, unpack_codes


def reference_bytes(codes: list[int], bits: int) -> list[int]:
    """Little-endian bit stream: code i starts at bit i * bits, least significant bit first."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[start : start + 8][::-1], 2) for start in range(0, len(stream), 8)]


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(NATIVE_BITS), data=st.data())
def test_bytes_are_the_reference_bit_stream_and_unpack_to_the_codes(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference_bytes(codes, bits)
    assert len(packed) == packed_num_bytes(len(codes), bits)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", NATIVE_BITS)
@pytest.mark.parametrize("length", [*range(1, 26), 1023, 4097])
def test_every_length_takes_the_fewest_whole_bytes(bits: int, length: int) -> None:
    codes = (torch.arange(length) * 7 % 2**bits).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() == packed_num_bytes(length, bits) == (length * bits + 7) // 8
    assert torch.equal(unpack_codes(packed, bits, length), codes)


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_any_shape_is_read_in_row_major_order(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 5, 7), dtype=torch.uint8)
    transposed = codes.transpose(0, 2)  # not contiguous
    expected = reference_bytes(transposed.flatten().tolist(), bits)
    assert pack_codes(transposed, bits).tolist() == expected


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_packed_bytes_do_not_share_memory_with_the_codes(bits: int) -> None:
    codes = torch.zeros(24, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    codes.fill_(1)
    assert not packed.any()
