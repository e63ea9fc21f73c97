"""Error feedback against the textbook loop, and against what it is meant to beat."""

import pytest
import torch

from peft_autoqra.errors import CalibrationError, InvalidPlanError
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.error_feedback import DAMPING, quantize_with_error_feedback
from peft_autoqra.quant.quantized_weight import QuantizedWeight

SHAPE, GROUP = (24, 320), 32  # more columns than one block holds


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gram() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(600, SHAPE[1], generator=generator) @ torch.randn(SHAPE[1], SHAPE[1], generator=generator)
    return inputs.T @ inputs / 600


def loss(weight: torch.Tensor, quantized: QuantizedWeight, gram: torch.Tensor) -> float:
    error = (weight - quantized.dequantize()).double()
    return float(((error @ gram.double()) * error).sum())


def textbook(weight: torch.Tensor, gram: torch.Tensor, start: QuantizedWeight, bits: int) -> torch.Tensor:
    """Optimal brain quantization in a fixed order: eliminate one column after the other from the inverse Hessian."""
    damped = gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram))
    inverse, left = torch.linalg.inv(damped), weight.double().clone()
    levels = levels_of(start, bits)  # [N, K, 2^bits]
    order, result = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist(), torch.zeros(SHAPE).double()
    for position, column in enumerate(order):
        distance = (levels[:, column] - left[:, column, None]).abs()
        result[:, column] = levels[:, column].gather(1, distance.argmin(1, keepdim=True)).squeeze(1)
        error = (left[:, column] - result[:, column]) / inverse[column, column]
        rest = order[position + 1 :]
        left[:, rest] -= error[:, None] * inverse[column, rest]
        inverse -= inverse[:, column, None] * inverse[column] / inverse[column, column]
    return result


def levels_of(start: QuantizedWeight, bits: int) -> torch.Tensor:
    """All values that each weight can take, read off weights whose codes are all alike."""
    values = []
    for code in range(2**bits):
        byte = sum(code << shift for shift in range(0, 8, bits))
        codes = torch.full_like(start.codes, byte)
        values.append(QuantizedWeight(start.format, codes, start.scale_codes, start.scale_base).dequantize().double())
    return torch.stack(values, dim=-1)


@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_textbook_loop(weight, gram, bits):
    start = quantize_affine(weight, bits=bits, group_size=GROUP, input_second_moment=gram.diagonal())
    found = quantize_with_error_feedback(weight, bits=bits, group_size=GROUP, input_gram=gram).dequantize().double()
    expected = textbook(weight, gram, start, bits)
    same = (found - expected).abs() < 1e-6  # a rounding tie that falls the other way moves the rest of its row
    assert same.double().mean() > 0.98


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_loses_less_than_rounding_to_nearest(weight, gram, bits):
    nearest = quantize_affine(weight, bits=bits, group_size=GROUP, input_second_moment=gram.diagonal())
    feedback = quantize_with_error_feedback(weight, bits=bits, group_size=GROUP, input_gram=gram)
    assert feedback.format == nearest.format
    assert loss(weight, feedback, gram) < 0.8 * loss(weight, nearest, gram)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uncorrelated_inputs_need_no_feedback(weight, bits):
    gram = torch.diag(torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(2)) + 0.1)
    nearest = quantize_affine(weight, bits=bits, group_size=GROUP, input_second_moment=gram.diagonal())
    feedback = quantize_with_error_feedback(weight, bits=bits, group_size=GROUP, input_gram=gram)
    assert torch.equal(feedback.codes, nearest.codes)


def test_zero_inputs_and_zero_weights_are_legal(weight):
    zero = torch.zeros(SHAPE[1], SHAPE[1])
    assert (
        quantize_with_error_feedback(weight, bits=3, group_size=GROUP, input_gram=zero).dequantize().isfinite().all()
    )
    none = quantize_with_error_feedback(torch.zeros(SHAPE), bits=3, group_size=GROUP, input_gram=torch.eye(SHAPE[1]))
    assert not none.dequantize().any()


def test_works_with_fewer_tokens_than_features(weight):
    inputs = torch.randn(10, SHAPE[1], generator=torch.Generator().manual_seed(3))
    gram = inputs.T @ inputs / 10
    quantized = quantize_with_error_feedback(weight, bits=3, group_size=GROUP, input_gram=gram)
    assert loss(weight, quantized, gram) < loss(weight, quantize_affine(weight, bits=3, group_size=GROUP), gram)


def test_refuses_bad_grams_and_weights(weight, gram):
    with pytest.raises(CalibrationError, match=r"shape \(320, 320\), not \(4, 4\)"):
        quantize_with_error_feedback(weight, bits=3, group_size=GROUP, input_gram=torch.eye(4))
    with pytest.raises(CalibrationError, match="must be finite"):
        quantize_with_error_feedback(weight, bits=3, group_size=GROUP, input_gram=gram * torch.nan)
    indefinite = torch.eye(SHAPE[1])
    indefinite[0, 1] = indefinite[1, 0] = 2
    with pytest.raises(CalibrationError, match="not positive definite"):
        quantize_with_error_feedback(weight, bits=3, group_size=GROUP, input_gram=indefinite)
    with pytest.raises(CalibrationError, match="not finite"):
        quantize_with_error_feedback(weight * torch.inf, bits=3, group_size=GROUP, input_gram=gram)
    with pytest.raises(InvalidPlanError, match="no groups of 48"):
        quantize_with_error_feedback(weight, bits=3, group_size=48, input_gram=gram)
