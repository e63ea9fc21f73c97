"""The fits: how good they are, what they survive and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_autoqra.errors import CalibrationError, InvalidPlanError
from peft_autoqra.quant import affine
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.packing import NATIVE_BITS
from peft_autoqra.quant.quantized_weight import QuantizedWeight

AFFINE_BITS = (2, 3, 4)


def weighted_error(weight: Tensor, decoded: Tensor, moment: Tensor) -> float:
    return float(((weight.double() - decoded.double()).square() * moment.double()).sum())


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Minimum and maximum of each group as ends of the grid, in float64 and without rounding of the scales."""
    groups = weight.double().reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-300)
    return (((groups - low) / scale).round() * scale + low).reshape(weight.shape)


def same_tensors(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.scale_codes, other.scale_codes)
        and torch.equal(one.scale_base, other.scale_base)
    )


def skewed_moment(columns: int) -> Tensor:
    """A few inputs that are a hundred times as strong as the others, as in real models."""
    return torch.where(torch.arange(columns) % 16 == 3, 100.0, 1.0) * (0.5 + torch.rand(columns))


@pytest.mark.parametrize("bits", AFFINE_BITS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), heavy_tails=st.booleans())
def test_the_weighted_fit_beats_the_data_free_one_and_naive_rounding(bits: int, seed: int, heavy_tails: bool) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(32, 128)
    if heavy_tails:
        weight = weight.pow(3)
    moment = skewed_moment(128)
    fitted = quantize_affine(weight, bits=bits, group_size=32, input_second_moment=moment).dequantize()
    data_free = quantize_affine(weight, bits=bits, group_size=32).dequantize()
    error = weighted_error(weight, fitted, moment)
    assert error <= weighted_error(weight, data_free, moment)
    assert error <= weighted_error(weight, round_to_nearest(weight, bits, 32), moment)


@pytest.mark.parametrize("calibrated", [False, True])
def test_more_bits_leave_less_error(calibrated: bool) -> None:
    weight = torch.randn(16, 64)
    moment = torch.ones(64) if calibrated else None
    fits = (quantize_affine(weight, bits=b, group_size=32, input_second_moment=moment) for b in NATIVE_BITS)
    errors = [weighted_error(weight, fit.dequantize(), torch.ones(64)) for fit in fits]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_the_data_free_fit_has_a_level_at_zero_and_keeps_the_largest_value(bits: int) -> None:
    weight = torch.randn(1, 32)
    weight[0, 5], weight[0, 9] = 0.0, -7.0
    decoded = quantize_affine(weight, bits=bits, group_size=32).dequantize()
    assert decoded[0, 5].abs() < 7.0 * 2**-6
    assert decoded[0, 9] == pytest.approx(-7.0, rel=0.02)


def test_8_bits_clip_nothing_and_round_to_half_a_step() -> None:
    weight = torch.randn(16, 64) * 3
    quantized = quantize_affine(weight, bits=8, group_size=32)
    scale = quantized.scale_base.view(torch.bfloat16).float().view(16, 2).repeat_interleave(32, dim=1)
    assert ((quantized.dequantize() - weight).abs() <= scale * 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_zero_weights_stay_zero(bits: int, calibrated: bool) -> None:
    moment = torch.rand(64) if calibrated else None
    quantized = quantize_affine(torch.zeros(8, 64), bits=bits, group_size=16, input_second_moment=moment)
    assert not quantized.dequantize().any()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", NATIVE_BITS)
@pytest.mark.parametrize("value", [1.0, -3.7, 1e-12])
def test_constant_groups_keep_their_value(bits: int, calibrated: bool, value: float) -> None:
    moment = torch.rand(64) + 0.1 if calibrated else None
    weight = torch.full((4, 64), value)
    decoded = quantize_affine(weight, bits=bits, group_size=16, input_second_moment=moment).dequantize()
    torch.testing.assert_close(decoded, weight, rtol=2e-2, atol=0)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", NATIVE_BITS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e20, 1e30])
def test_relative_error_does_not_depend_on_the_magnitude(bits: int, calibrated: bool, magnitude: float) -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(8, 64).clamp(-3, 3), skewed_moment(64)

    def relative_error(scaled: Tensor) -> float:
        quantized = quantize_affine(
            scaled, bits=bits, group_size=16, input_second_moment=moment if calibrated else None
        )
        return float((quantized.dequantize().double() - scaled.double()).norm() / scaled.double().norm())

    assert relative_error(weight * magnitude) == pytest.approx(relative_error(weight), rel=0.1)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("factor", [1e-35, 1e-6, 1e10, 1e35])
def test_the_scale_of_the_moments_does_not_matter(bits: int, factor: float) -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(8, 64), skewed_moment(64)
    plain = quantize_affine(weight, bits=bits, group_size=16, input_second_moment=moment)
    scaled = quantize_affine(weight, bits=bits, group_size=16, input_second_moment=moment * factor)
    torch.testing.assert_close(
        weighted_error(weight, scaled.dequantize(), moment),
        weighted_error(weight, plain.dequantize(), moment),
        rtol=1e-2,
        atol=0,
    )


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_inputs_that_calibration_never_saw(bits: int) -> None:
    weight = torch.randn(8, 64)
    unseen = torch.zeros(64)
    uniform = quantize_affine(weight, bits=bits, group_size=16, input_second_moment=torch.ones(64)).dequantize()
    decoded = quantize_affine(weight, bits=bits, group_size=16, input_second_moment=unseen).dequantize()
    torch.testing.assert_close(decoded, uniform)
    half_seen = torch.cat((torch.zeros(32), torch.ones(32)))
    decoded = quantize_affine(weight, bits=bits, group_size=16, input_second_moment=half_seen).dequantize()
    torch.testing.assert_close(decoded, uniform)  # zero or one within each group


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_one_row_of_one_group(bits: int) -> None:
    weight = torch.linspace(-1, 1, 8)[None]
    decoded = quantize_affine(weight, bits=bits, group_size=8, input_second_moment=torch.ones(8)).dequantize()
    assert (decoded - weight).abs().max() < 2.0 / (2**bits - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_in_another_dtype_gives_the_codes_of_its_float32_values(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64).to(dtype)
    assert same_tensors(
        quantize_affine(weight, bits=3, group_size=16), quantize_affine(weight.float(), bits=3, group_size=16)
    )


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_the_weight_is_left_alone(bits: int) -> None:
    weight, moment = torch.randn(8, 64), torch.rand(64)
    before = weight.clone(), moment.clone()
    quantize_affine(weight, bits=bits, group_size=16, input_second_moment=moment)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_the_same_input_gives_the_same_bytes(bits: int) -> None:
    weight, moment = torch.randn(40, 96), torch.rand(96)
    first, second = (
        quantize_affine(weight.clone(), bits=bits, group_size=32, input_second_moment=moment.clone()) for _ in range(2)
    )
    assert same_tensors(first, second)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_the_result_does_not_depend_on_row_chunks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = torch.randn(37, 96), torch.rand(96)
    whole = quantize_affine(weight, bits=bits, group_size=32, input_second_moment=moment)
    monkeypatch.setattr(affine, "_WEIGHTS_PER_THREAD_AT_ONCE", 96 * 5)
    assert same_tensors(whole, quantize_affine(weight, bits=bits, group_size=32, input_second_moment=moment))


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_the_result_does_not_depend_on_the_number_of_threads(bits: int) -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(256, 1024), torch.rand(1024)  # large enough for torch to split the work
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            quantized = quantize_affine(weight, bits=bits, group_size=64, input_second_moment=moment)
            results.append((quantized, quantized.dequantize()))
    finally:
        torch.set_num_threads(threads)
    assert same_tensors(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("bits", [1, 5, 16, 0])
def test_bits_without_a_native_format(bits: int) -> None:
    with pytest.raises(InvalidPlanError, match=rf"bits={bits} has no native format"):
        quantize_affine(torch.randn(4, 64), bits=bits, group_size=16)


@pytest.mark.parametrize("shape", [(4, 60), (64,), (2, 4, 64)])
def test_a_weight_without_groups(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidPlanError, match="no groups of 16"):
        quantize_affine(torch.randn(shape), bits=4, group_size=16)


@pytest.mark.parametrize("bits", NATIVE_BITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite(bits: int, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(CalibrationError, match="not finite"):
        quantize_affine(weight, bits=bits, group_size=16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_moments_that_no_input_has(value: float) -> None:
    moment = torch.ones(64)
    moment[7] = value
    with pytest.raises(CalibrationError, match="finite and not negative"):
        quantize_affine(torch.randn(4, 64), bits=4, group_size=16, input_second_moment=moment)


@pytest.mark.parametrize("shape", [(32,), (64, 1), (1, 64), ()])
def test_moments_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"needs \(64,\)"):
        quantize_affine(torch.randn(4, 64), bits=4, group_size=16, input_second_moment=torch.ones(shape))
