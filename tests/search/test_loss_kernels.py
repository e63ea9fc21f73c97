import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel

from peft_autoqra.search.loss_kernels import BlockLinearKernel, ProxyMean, SameLevelKernel, loss_kernel

BLOCKS = np.array([0, 0, 1, 1, 1])


def inputs(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_block_linear_kernel_is_the_sum_over_columns():
    kernel = BlockLinearKernel(BLOCKS, range(2, 7))
    with torch.no_grad():
        kernel.log_deviations.copy_(torch.tensor([0.3, -1.0], dtype=torch.float64))
    first, second = inputs(4, 8), inputs(3, 8, seed=1)
    deviations = np.exp([0.3, 0.3, -1.0, -1.0, -1.0])
    expected = [
        [sum(deviations[c] ** 2 * float(x[2 + c] * y[2 + c]) for c in range(5)) for y in second] for x in first
    ]
    np.testing.assert_allclose(kernel(first, second).to_dense().detach(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(kernel(first, diag=True).detach(), kernel(first).to_dense().diagonal().detach())


def test_cheap_fidelities_share_a_bias_and_the_top_has_none():
    levels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    expected = [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert SameLevelKernel()(levels).to_dense().tolist() == expected
    assert SameLevelKernel()(levels, diag=True).tolist() == [1, 1, 0, 1]


def test_mean_by_level():
    mean = ProxyMean([0, 1])
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    assert mean(x).tolist() == [2.0, 2.0, 2.0]
    with torch.no_grad():
        mean.constants.copy_(torch.tensor([0.1, 0.2, 0.3]))
        mean.log_scales.copy_(torch.tensor([2.0, 3.0, 4.0]).log())
    assert mean(x).tolist() == pytest.approx([0.2 + 3 * 2, 0.3 + 4 * 2, 0.1 + 2 * 2])
    assert mean(x.expand(5, 3, 3)).shape == (5, 3)


def test_loss_kernel_is_the_sum_of_its_parts():
    """Columns: two of groups, one coverage, five linear, one level, and the prediction, which it does not look at."""
    kernel = loss_kernel(range(2), range(2, 3), BLOCKS, range(3, 8), range(8, 9))
    x = inputs(6, 10)
    x[:, 8] = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    parts = kernel.kernels

    def matern(part, columns):
        reference = MaternKernel(nu=2.5)
        reference.lengthscale = part.base_kernel.lengthscale
        return part.outputscale * reference(x[:, columns]).to_dense()

    linear = BlockLinearKernel(BLOCKS, range(3, 8))(x).to_dense()
    expected = linear + matern(parts[1], [0, 1]) + matern(parts[2], [2])
    cheap = x[:, 8][:, None] * x[:, 8]
    biased = expected + cheap * (linear + matern(parts[4].kernels[1], [2]))
    np.testing.assert_allclose(kernel(x).to_dense().detach(), biased.detach(), rtol=1e-6)
    moved = x.clone()
    moved[:, 9] += 1
    assert torch.equal(kernel(moved).to_dense(), kernel(x).to_dense())
    without = loss_kernel(range(2), range(2, 3), BLOCKS, range(3, 8), range(8, 8))
    np.testing.assert_allclose(without(x).to_dense().detach(), expected.detach(), rtol=1e-6)
