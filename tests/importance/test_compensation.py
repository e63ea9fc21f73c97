import math

import pytest
import torch

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance import compensation
from peft_autoqra.importance.compensation import RIGHT_ROW_NORM, InputMetric, output_scale, whiten_error

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 8), (8, 1)]
DAMPING = 1e-2


def make(shape: tuple[int, int], seed: int = 0):
    """A random error, its metric with one outlier input, and its output scale."""
    num_outputs, num_inputs = shape
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(shape, generator=generator)
    inputs = torch.randn(200, num_inputs, generator=generator)
    inputs[:, 0] *= 20
    gradients = torch.rand(num_outputs, generator=generator) ** 4
    return error, InputMetric(inputs.T @ inputs / 200, DAMPING), output_scale(gradients, 1e-2)


def symmetric_root(moment: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def whiten(error, metric, scale):
    """The explicit whitened matrix, by another root of H than the code's."""
    return scale.double()[:, None] * error.double() @ symmetric_root(metric.moment)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_those_of_the_explicit_matrix(shape):
    error, metric, scale = make(shape)
    expected = torch.linalg.svdvals(whiten(error, metric, scale)).square()
    found = whiten_error(error, metric, scale).squared_singular_values
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_factors_leave_the_residual_of_the_truncated_svd(shape, rank):
    error, metric, scale = make(shape)
    whitened = whiten_error(error, metric, scale)
    left, right = whitened.factors(rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])

    singular = torch.linalg.svdvals(whiten(error, metric, scale))
    best = float(singular[rank:].square().sum())
    left_over = float(whiten(error - left @ right, metric, scale).square().sum())
    tolerance = 1e-5 * float(singular.square().sum())
    assert left_over == pytest.approx(best, rel=1e-3, abs=tolerance)
    assert float(whitened.residuals(rank)[rank]) == pytest.approx(best, rel=1e-3, abs=tolerance)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_no_perturbation_does_better(shape):
    error, metric, scale = make(shape)
    left, right = whiten_error(error, metric, scale).factors(4)
    best = whiten(error - left @ right, metric, scale).norm()
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1) * 10:
        other_left = left + size * left.norm() / left.numel() ** 0.5 * torch.randn(left.shape, generator=generator)
        other_right = right + size * RIGHT_ROW_NORM / 4 * torch.randn(right.shape, generator=generator)
        assert whiten(error - other_left @ other_right, metric, scale).norm() >= best * (1 - 1e-6)


def test_smaller_corrections_are_prefixes_of_larger_ones():
    error, metric, scale = make((12, 20))
    whitened = whiten_error(error, metric, scale)
    left, right = whitened.factors(8)
    small_left, small_right = whitened.factors(3)
    torch.testing.assert_close(left[:, :3], small_left)
    torch.testing.assert_close(right[:3], small_right)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (64, 512)])
def test_rows_of_right_have_the_norm_of_a_fresh_lora_a(shape):
    error, metric, scale = make(shape)
    _, right = whiten_error(error, metric, scale).factors(8)
    torch.testing.assert_close(right.norm(dim=1), torch.full((8,), RIGHT_ROW_NORM))
    fresh = torch.nn.init.kaiming_uniform_(torch.empty(400, 512), a=math.sqrt(5))
    assert float(fresh.norm(dim=1).mean()) == pytest.approx(RIGHT_ROW_NORM, rel=0.01)


def test_residuals_fall_to_zero_at_full_rank():
    residuals = whiten_error(*make((6, 9))).residuals(10)
    assert residuals.shape == (11,)
    assert bool((residuals.diff() <= 0).all())
    assert float(residuals[5]) > 0
    assert residuals[6:].tolist() == [0.0] * 5


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("zero", ["error", "inputs", "gradients"])
def test_nothing_to_correct_starts_like_ordinary_lora(shape, zero):
    error, metric, scale = make(shape)
    if zero == "error":
        error = torch.zeros(shape)
    elif zero == "inputs":
        metric = InputMetric(torch.zeros(shape[1], shape[1]), DAMPING)
    else:
        scale = output_scale(torch.zeros(shape[0]), 1e-2)
    whitened = whiten_error(error, metric, scale)
    left, right = whitened.factors(4)
    assert not whitened.residuals(4).any()
    assert not left.any()
    assert float(right.norm(dim=1).min()) > 0.1
    assert torch.isfinite(right).all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_ranks_above_the_error_are_filled_with_trainable_components(shape):
    error, metric, scale = make(shape)
    error = error[:, :1] @ error[:1]  # rank 1
    left, right = whiten_error(error, metric, scale).factors(12)
    torch.testing.assert_close(left @ right, error, rtol=1e-3, atol=1e-3)
    assert not left[:, 6:].any()
    assert float(right.norm(dim=1).min()) > 0.1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_survive_float16(shape):
    error, metric, scale = make(shape)
    left, right = whiten_error(error * 1e-3, metric, scale).factors(4)
    stored = left.half().float() @ right.half().float()
    assert (stored - left @ right).norm() <= 2e-3 * (left @ right).norm()


def test_scale_is_floored_at_a_fraction_of_the_mean():
    moment = torch.tensor([0.0, 1e-9, 4.0, 4.0])
    torch.testing.assert_close(output_scale(moment, 1e-2), torch.tensor([0.02, 0.02, 4.0, 4.0]).sqrt())


def test_names_a_singular_input_gram():
    error, _, scale = make((9, 6))
    with pytest.raises(CalibrationError, match="not positive definite"):
        whiten_error(error, InputMetric(torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0])), 0.0), scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diagonal_metric_is_the_full_one_without_correlations(shape):
    error, metric, scale = make(shape)
    diagonal = metric.moment.diagonal()
    short, full = InputMetric(diagonal.clone(), 0), InputMetric(torch.diag(diagonal), 0)
    found, expected = whiten_error(error, short, scale), whiten_error(error, full, scale)
    torch.testing.assert_close(found.residuals(8), expected.residuals(8), rtol=1e-4, atol=1e-4)
    products = [left @ right for left, right in (found.factors(3), expected.factors(3))]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
@pytest.mark.parametrize("decay", [0.0, 1.0], ids=["flat", "steep"])
def test_randomized_decomposition_loses_at_most_one_percent(monkeypatch, shape, decay):
    """A flat spectrum is the worst case: no gap tells the wanted directions from the rest."""
    generator = torch.Generator().manual_seed(5)
    size, max_rank = min(shape), 16
    left, _ = torch.linalg.qr(torch.randn(shape[0], size, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], size, generator=generator))
    spectrum = torch.arange(1, size + 1) ** -decay
    error, scale = (left * spectrum) @ right.T, torch.ones(shape[0])
    metric = InputMetric(torch.eye(shape[1]), 0)
    exact = whiten_error(error, metric, scale, max_rank).residuals(max_rank)
    monkeypatch.setattr(compensation, "EXACT_SIDE", 1)
    found = whiten_error(error, metric, scale, max_rank)
    assert len(found.squared_singular_values) == max_rank
    residuals = found.residuals(max_rank)
    assert bool((residuals >= exact * (1 - 1e-5)).all())
    assert bool((residuals <= exact * 1.01).all())
    for rank in (4, max_rank):
        remaining = error - torch.matmul(*found.factors(rank))
        assert float(remaining.square().sum()) == pytest.approx(float(residuals[rank]), rel=1e-3)


def test_randomized_decomposition_is_the_same_every_time_and_leaves_the_global_generator_alone(monkeypatch):
    error, metric, scale = make((200, 150))
    monkeypatch.setattr(compensation, "EXACT_SIDE", 1)
    state = torch.random.get_rng_state()
    first = whiten_error(error, metric, scale, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(whiten_error(error, metric, scale, 4).vectors, first.vectors)
