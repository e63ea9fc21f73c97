"""Kernels and prior mean of the loss model: mis-scoring that groups share, a smooth rest, and cheap fidelities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, ProductKernel, ScaleKernel
from gpytorch.means import Mean
from gpytorch.priors import GammaPrior, LogNormalPrior, NormalPrior

LOG_DEVIATION = math.log(0.2)
"""Prior median of the standard deviation of a column's weight: the estimate is off by some ten percent."""


class BlockLinearKernel(Kernel):  # type: ignore[misc]
    """``k(x, x') = sum over columns of deviation[block of column]^2 x_c x'_c``: a linear model with shared shrinkage.

    Args:
        block_of_column: block index of every active column, ``[num_columns]``.
        active_dims: columns that the kernel looks at.
    """

    def __init__(self, block_of_column: npt.NDArray[np.int64], active_dims: Sequence[int]) -> None:
        """Every block starts at its prior."""
        super().__init__(active_dims=tuple(active_dims))
        self.register_buffer("block_of_column", torch.from_numpy(np.asarray(block_of_column)))
        start = torch.full((int(block_of_column.max()) + 1,), LOG_DEVIATION, dtype=torch.float64)
        self.register_parameter("log_deviations", torch.nn.Parameter(start))
        self.register_prior("log_deviations_prior", NormalPrior(LOG_DEVIATION, 1.0), "log_deviations")

    @property
    def deviations(self) -> torch.Tensor:
        """Prior standard deviation of every column's weight, ``[num_columns]``."""
        deviations: torch.Tensor = self.log_deviations.exp()[self.block_of_column]
        return deviations

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **_: object) -> torch.Tensor:
        """``[..., n1, n2]`` from ``[..., n1, num_columns]`` and ``[..., n2, num_columns]``; ``[..., n]`` if diag."""
        first, second = x1 * self.deviations, x2 * self.deviations
        return (first * second).sum(-1) if diag else first @ second.transpose(-1, -2)


class SameLevelKernel(Kernel):  # type: ignore[misc]
    """One where two inputs are of the same cheap fidelity, else zero; columns are indicators, all zero at the top."""

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **_: object) -> torch.Tensor:
        """As :meth:`BlockLinearKernel.forward`."""
        return (x1 * x2).sum(-1) if diag else x1 @ x2.transpose(-1, -2)


class ProxyMean(Mean):  # type: ignore[misc]
    """``m(x) = constant[level] + exp(log_scale[level]) * prediction``, the last column being the prediction.

    All are learned. A scale is positive, and about one (within a factor of two) unless the data say otherwise:
    training recovers a part of the predicted rise, but hardly turns its order round.

    Args:
        level_columns: columns that indicate the cheap fidelities; none of them is set at the top.
    """

    def __init__(self, level_columns: Sequence[int]) -> None:
        """Start at the proxy itself."""
        super().__init__()
        self._level_columns = list(level_columns)
        zeros = torch.zeros(len(self._level_columns) + 1, dtype=torch.float64)
        self.register_parameter("constants", torch.nn.Parameter(zeros.clone()))
        self.register_parameter("log_scales", torch.nn.Parameter(zeros.clone()))
        self.register_prior("constants_prior", NormalPrior(0.0, 1.0), "constants")
        self.register_prior("log_scales_prior", NormalPrior(0.0, 0.7), "log_scales")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Prior mean ``[..., n]`` at ``[..., n, d]``."""
        cheap = x[..., self._level_columns]
        level = torch.cat([1 - cheap.sum(-1, keepdim=True), cheap], dim=-1)  # [..., n, num_levels]
        mean: torch.Tensor = level @ self.constants + (level @ self.log_scales).exp() * x[..., -1]
        return mean


def smooth_kernel(columns: Sequence[int], log_lengthscale: float, outputscale: float) -> ScaleKernel:
    """Matérn-5/2 with one lengthscale for all columns."""
    kernel = ScaleKernel(
        MaternKernel(nu=2.5, active_dims=tuple(columns), lengthscale_prior=LogNormalPrior(log_lengthscale, 1.0)),
        outputscale_prior=GammaPrior(2.0, 2.0 / outputscale),
    )
    kernel.outputscale = outputscale
    return kernel


def loss_kernel(
    groups: range, coverages: range, blocks: npt.NDArray[np.int64], linear: range, levels: range
) -> Kernel:
    """Covariance of the loss over candidates and fidelities.

    A linear part on the blocks of :class:`LossFeatures` (what the additive estimate gets wrong in common), and
    Matérn-5/2 on the coverages and on the groups of the ordinal embedding (a trend, and what is left). A cheap
    fidelity is the expensive one plus a bias of its own with the same two parts (Kennedy & O'Hagan 2000).

    A group's edits are short moves in the embedding (0.03 at 64 equal groups), hence the shorter lengthscale there.

    Args:
        groups: columns of the embedding's groups.
        coverages: columns of its coverages.
        blocks: block of every linear column.
        linear: columns of the linear part.
        levels: columns that indicate the cheap fidelities.
    """
    parts: list[Kernel] = [
        BlockLinearKernel(blocks, linear),
        smooth_kernel(groups, -1.5, 0.3),
        smooth_kernel(coverages, -0.5, 0.3),
    ]
    if levels:
        for bias in (BlockLinearKernel(blocks, linear), smooth_kernel(coverages, -0.5, 0.3)):
            parts.append(ProductKernel(SameLevelKernel(active_dims=tuple(levels)), bias))
    return AdditiveKernel(*parts)
