"""The format: closed-form bytes, group sizes, and decoding against a formula written in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.packing import NATIVE_BITS, unpack_codes
from peft_autoqra.quant.quantized_weight import WeightFormat, fit_group_size


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(NATIVE_BITS),
    group_size=st.sampled_from((8, 16, 32)),
    rows=st.integers(1, 40),
    groups_per_row=st.integers(1, 9),
    calibrated=st.booleans(),
)
def test_bytes_equal_the_closed_form_and_the_real_tensors(
    bits: int, group_size: int, rows: int, groups_per_row: int, calibrated: bool
) -> None:
    columns = group_size * groups_per_row
    moment = torch.ones(columns) if calibrated else None
    quantized = quantize_affine(
        torch.randn(rows, columns), bits=bits, group_size=group_size, input_second_moment=moment
    )
    num_groups = rows * columns // group_size
    metadata = 2 * num_groups + (0 if bits == 8 else 8 * ((num_groups + 255) // 256))
    assert quantized.format.weight_bytes == num_bytes(quantized.codes) == (rows * columns * bits + 7) // 8
    assert quantized.format.metadata_bytes == metadata
    assert num_bytes(quantized.scale_codes) + num_bytes(quantized.scale_base) == metadata


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_no_tensor_is_floating(bits: int) -> None:
    quantized = quantize_affine(torch.randn(4, 64), bits=bits, group_size=32)
    tensors = (quantized.codes, quantized.scale_codes, quantized.scale_base)
    assert not any(tensor.is_floating_point() for tensor in tensors)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_decodes_to_scale_times_code_plus_offset(bits: int, calibrated: bool) -> None:
    rows, columns, group_size = 70, 64, 16  # 280 groups: two superblocks
    weight = torch.randn(rows, columns)
    quantized = quantize_affine(
        weight, bits=bits, group_size=group_size, input_second_moment=torch.rand(columns) if calibrated else None
    )
    codes = unpack_codes(quantized.codes, bits, weight.numel()).numpy().reshape(-1, group_size).astype(np.float64)
    base = quantized.scale_base.view(torch.bfloat16).double().numpy()
    if bits == 8:
        expected = base[:, None] * (codes - 128)
    else:
        superblock = np.arange(codes.shape[0]) // 256
        scale, offset = (
            base[kind, superblock, 0] + base[kind, superblock, 1] * quantized.scale_codes[kind].numpy()
            for kind in (0, 1)
        )
        expected = scale[:, None] * codes + offset[:, None]
    decoded = quantized.dequantize().numpy().reshape(-1, group_size)
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_a_narrow_dtype_gets_the_rounded_float32_values(bits: int, dtype: torch.dtype) -> None:
    quantized = quantize_affine(torch.randn(6, 64), bits=bits, group_size=16)
    assert torch.equal(quantized.dequantize(dtype), quantized.dequantize().to(dtype))


@pytest.mark.parametrize(
    ("wanted", "in_features", "fitted"), [(64, 128, 64), (128, 576, 64), (64, 96, 32), (64, 8, 8), (256, 1000, 8)]
)
def test_group_size_is_halved_until_it_divides(wanted: int, in_features: int, fitted: int) -> None:
    assert fit_group_size(wanted, in_features, "layer") == fitted


@pytest.mark.parametrize("in_features", [1, 7, 12, 100, 1023])
def test_an_input_size_without_groups_is_refused_by_name(in_features: int) -> None:
    with pytest.raises(InvalidPlanError, match=rf"'mlp\.odd' has {in_features} input features.*bits=16"):
        fit_group_size(64, in_features, "mlp.odd")


def test_bits_per_weight_of_the_design() -> None:
    large = WeightFormat(4, 128, 4096, 4096)
    assert (large.weight_bytes + large.metadata_bytes) * 8 / 4096**2 == pytest.approx(4.127, abs=1e-3)
    assert WeightFormat(3, 64, 4096, 4096).metadata_bytes * 8 / 4096**2 == pytest.approx(0.254, abs=1e-3)
