"""Quantizing and correcting a module, against an explicit singular value decomposition."""

import pytest
import torch

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.compensation import DAMPING, GRADIENT_FLOOR
from peft_autoqra.importance.module_fit import FitSettings, calibrated_modules
from peft_autoqra.importance.statistics import CalibrationStatistics, ModuleStatistics
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant.backends import calibrated_backend

SETTINGS = FitSettings(max_rank=8)
SHAPES = {"q": (16, 32), "k": (4, 32), "down": (32, 16)}
AFFINE, GPTQ = (calibrated_backend(QuantizerSettings(backend=name, group_size=8)).fit for name in ("native", "gptq"))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def statistics() -> CalibrationStatistics:
    generator = torch.Generator().manual_seed(1)
    grams = {}
    for size in (32, 16):
        inputs = torch.randn(100, size, generator=generator) @ torch.randn(size, size, generator=generator)
        grams[size] = inputs.T @ inputs / 100
    return CalibrationStatistics(
        {
            name: ModuleStatistics(
                input_gram=grams[num_inputs],
                output_gradient_second_moment=torch.rand(num_outputs, generator=generator),
                num_tokens=100,
            )
            for name, (num_outputs, num_inputs) in SHAPES.items()
        }
    )


def module(weights, statistics, name: str = "q"):
    return next(calibrated_modules([(name, weights[name])], statistics))


def whitened(error: torch.Tensor, statistics: ModuleStatistics) -> torch.Tensor:
    gram, gradient = statistics.input_gram.double(), statistics.output_gradient_second_moment
    moment = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    scale = gradient.clamp_min(GRADIENT_FLOOR * gradient.mean()).sqrt()
    return scale[:, None].double() * error.double() @ torch.linalg.cholesky(moment)


@pytest.mark.parametrize("quantize", [AFFINE, GPTQ], ids=["native", "gptq"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_rise_is_half_the_squared_singular_values_left(weights, statistics, name, bits, quantize):
    fit = module(weights, statistics, name).fit(quantize, bits, SETTINGS)
    squares = torch.linalg.svdvals(whitened(weights[name] - fit.weight.dequantize(), statistics[name])).square()
    assert fit.rises.dtype == torch.float64
    for rank in range(9):
        expected = float(squares[rank:].sum()) / 2
        assert float(fit.rises[rank]) == pytest.approx(expected, rel=1e-3, abs=1e-5 * float(squares.sum()))


@pytest.mark.parametrize("quantize", [AFFINE, GPTQ], ids=["native", "gptq"])
def test_correction_leaves_what_the_rises_say(weights, statistics, quantize):
    fit = module(weights, statistics).fit(quantize, 2, SETTINGS)
    for rank in (0, 2, 8):
        error = weights["q"] - fit.weight.dequantize() - fit.left[:, :rank] @ fit.right[:rank]
        left_over = float(whitened(error, statistics["q"]).square().sum()) / 2
        assert left_over == pytest.approx(float(fit.rises[rank]), rel=1e-3)


def test_ranks_above_the_smaller_side_leave_nothing(weights, statistics):
    fit = module(weights, statistics, "k").fit(AFFINE, 2, SETTINGS)
    assert (fit.left.shape, fit.right.shape) == ((4, 4), (4, 32))
    assert fit.rises[3] > 0
    assert not fit.rises[4:].any()


@pytest.mark.parametrize("quantize", [AFFINE, GPTQ], ids=["native", "gptq"])
@pytest.mark.parametrize("bits", [2, 3])
def test_alternating_never_loses_and_gains_at_two_bits(weights, statistics, quantize, bits):
    once, more = (
        module(weights, statistics).fit(quantize, bits, FitSettings(max_rank=4, alternations=n)) for n in (0, 5)
    )
    assert more.rises[4] <= once.rises[4]
    if bits == 2:
        assert more.rises[4] < 0.99 * once.rises[4]
    error = weights["q"] - more.weight.dequantize() - more.left @ more.right
    assert float(whitened(error, statistics["q"]).square().sum()) / 2 == pytest.approx(float(more.rises[4]), rel=1e-3)


def test_refuses_modules_without_statistics(weights, statistics):
    with pytest.raises(CalibrationError, match="'other' was not calibrated"):
        list(calibrated_modules([("other", weights["q"])], statistics))


def test_refuses_weights_of_another_model(weights, statistics):
    with pytest.raises(
        CalibrationError, match=r"'q' has a weight of shape \(32, 16\), but was calibrated with \(16, 32\)"
    ):
        list(calibrated_modules([("q", weights["down"])], statistics))


@pytest.mark.parametrize("bad", [{"max_rank": -1}, {"max_rank": 1, "alternations": -1}, {"max_rank": 1.5}])
def test_refuses_negative_settings(bad):
    with pytest.raises(CalibrationError, match="must be an integer of at least 0"):
        FitSettings(**bad)
