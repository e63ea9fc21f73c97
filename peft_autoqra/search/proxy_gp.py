"""Gaussian process of the true loss around the additive proxy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, ScaleKernel
from gpytorch.means import Mean
from gpytorch.priors import GammaPrior, LogNormalPrior, NormalPrior
from scipy.special import erfcx, ndtr

from peft_autoqra.search.embedding import OrdinalEmbedding
from peft_autoqra.search.gp_fit import fit_hyperparameters

MIN_NOISE_VARIANCE = 1e-4  # of standardized losses; below it, covariances of near-identical candidates are singular
MIN_VARIANCE = 1e-10
PROXY_DISTRUST = 0.1  # of a predicted rise, by which the truth may well differ


class ProxyMean(Mean):  # type: ignore[misc]
    """``m(x) = constant + exp(log_scale) * x[..., -1]``, the last column being the additive prediction.

    Both are learned. The scale is positive, and about one (within a factor of two) unless the data say otherwise:
    training recovers a part of the predicted rise, but hardly turns its order round.
    """

    def __init__(self) -> None:
        """Start at the proxy itself."""
        super().__init__()
        self.register_parameter("constant", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
        self.register_parameter("log_scale", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
        self.register_prior("constant_prior", NormalPrior(0.0, 1.0), "constant")
        self.register_prior("log_scale_prior", NormalPrior(0.0, 0.7), "log_scale")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Prior mean ``[..., n]`` at ``[..., n, d]``."""
        mean: torch.Tensor = self.constant + self.log_scale.exp() * x[..., -1]
        return mean


def _kernel(num_group_columns: int, num_coverage_columns: int) -> Kernel:
    """Matérn-5/2 on the coverages plus Matérn-5/2 on the groups: a trend, and what single groups do to it.

    A group's edits are short moves in the embedding (0.03 at 64 equal groups), hence the shorter lengthscale there.
    """
    stop = num_group_columns + num_coverage_columns
    columns = ((range(num_group_columns), -1.5), (range(num_group_columns, stop), -0.5))
    parts = [
        ScaleKernel(
            MaternKernel(nu=2.5, active_dims=tuple(dims), lengthscale_prior=LogNormalPrior(log_lengthscale, 1.0)),
            outputscale_prior=GammaPrior(2.0, 1.0),
        )
        for dims, log_lengthscale in columns
    ]
    for part in parts:
        part.outputscale = 1.0
    return AdditiveKernel(*parts)


@dataclass(frozen=True)
class LossScaling:
    """Nats to standardized units and back: ``standardized = (loss - offset) / unit``; predictions share the unit.

    Attributes:
        offset: mean observed loss.
        unit: standard deviation of the observed losses, or ``PROXY_DISTRUST`` of the mean predicted rise where that
            is more: candidates that happen to be close do not make the model sure of all others.
        predicted_offset: mean prediction.
    """

    offset: float
    unit: float
    predicted_offset: float

    @classmethod
    def fit(cls, losses: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> LossScaling:
        """From observed losses and their predictions, each ``[num_observations]``."""
        resolution = 1e-9 * max(1.0, float(np.abs(losses).max()))
        unit = max(float(losses.std()), PROXY_DISTRUST * float(np.abs(predicted).mean()), resolution)
        return cls(float(losses.mean()), unit, float(predicted.mean()))


class ProxyGP:
    """Posterior over the true loss, ``y = a + b * predicted + GP(embedding)``, float64.

    Args:
        embedding: of the search problem.
        positions: observed candidates, ``[num_observations, num_groups, 2]``.
        losses: nats per token, ``[num_observations]``.
        standard_errors: of the losses, nats per token, NaN where unknown, ``[num_observations]``. Unknown ones are
            taken to be as large as the known ones on average; where none is known the noise is learned.
    """

    def __init__(
        self,
        embedding: OrdinalEmbedding,
        positions: npt.NDArray[np.int64],
        losses: npt.NDArray[np.float64],
        standard_errors: npt.NDArray[np.float64],
    ) -> None:
        """Standardize, and fit the hyperparameters by maximum a posteriori."""
        self.embedding = embedding
        self.scaling = LossScaling.fit(losses, embedding.predicted_losses(positions))
        self.model = SingleTaskGP(
            self._inputs(positions),
            torch.from_numpy((losses - self.scaling.offset) / self.scaling.unit)[:, None],
            train_Yvar=self._noise_variances(standard_errors),
            covar_module=_kernel(embedding.num_group_columns, embedding.num_coverage_columns),
            mean_module=ProxyMean(),
            outcome_transform=None,
        )
        fit_hyperparameters(self.model, seed=0)
        inputs, targets = self.model.train_inputs[0], self.model.train_targets
        self._condition(inputs, targets, self.model.likelihood.noise.detach().expand_as(targets))

    def _inputs(self, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """Embedding and standardized prediction, ``[num_candidates, d + 1]``."""
        predicted = self.embedding.predicted_losses(positions) - self.scaling.predicted_offset
        embedded = self.embedding.transform_positions(positions)
        return torch.from_numpy(np.column_stack([embedded, predicted / self.scaling.unit]))

    def _noise_variances(self, standard_errors: npt.NDArray[np.float64]) -> torch.Tensor | None:
        """Standardized, ``[num_observations, 1]``; None to have the noise learned."""
        variances = np.square(standard_errors / self.scaling.unit)
        known = np.isfinite(variances)
        if not known.any():
            return None
        variances = np.where(known, variances, variances[known].mean())
        return torch.from_numpy(np.maximum(variances, MIN_NOISE_VARIANCE))[:, None]

    def _condition(self, inputs: torch.Tensor, targets: torch.Tensor, noise: torch.Tensor) -> None:
        """Factorize the covariance of ``[n, d + 1]`` inputs, so that posteriors are two products.

        GPyTorch's own posterior of thousands of single candidates copies the training data for each of them.
        """
        self._conditioned = (inputs, targets, noise)
        with torch.no_grad():
            covariance = self.model.covar_module(inputs).to_dense() + torch.diag(noise)
            self._cholesky = torch.linalg.cholesky(covariance)
            residuals = (targets - self.model.mean_module(inputs))[:, None]
            self._residual_weights = torch.cholesky_solve(residuals, self._cholesky)

    def posterior(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Expected loss and its standard deviation without observation noise, nats, each ``[num_candidates]``."""
        inputs = self._inputs(positions)
        with torch.no_grad():
            cross = self.model.covar_module(inputs, self._conditioned[0]).to_dense()
            mean = self.model.mean_module(inputs) + (cross @ self._residual_weights)[:, 0]
            explained = torch.linalg.solve_triangular(self._cholesky, cross.T, upper=False).square().sum(dim=0)
            prior = sum(part.outputscale for part in self.model.covar_module.kernels)
            deviation = (prior - explained).clamp_min(MIN_VARIANCE).sqrt()
        unit, offset = self.scaling.unit, self.scaling.offset
        return np.asarray(mean.numpy() * unit + offset), np.asarray(deviation.numpy() * unit)

    def log_expected_improvement(self, positions: npt.NDArray[np.int64], best_loss: float) -> npt.NDArray[np.float64]:
        """Log of the expected improvement below ``best_loss`` (AutoQRA, Eq. 10), log nats, ``[num_candidates]``."""
        mean, deviation = self.posterior(positions)
        return np.asarray(np.log(deviation) + log_improvement((best_loss - mean) / deviation))

    def believe(self, positions: npt.NDArray[np.int64]) -> None:
        """Condition on candidates under evaluation as if they gave their expected loss (kriging believer)."""
        inputs, targets, noise = self._conditioned
        expected = torch.from_numpy((self.posterior(positions)[0] - self.scaling.offset) / self.scaling.unit)
        self._condition(
            torch.cat([inputs, self._inputs(positions)]),
            torch.cat([targets, expected]),
            torch.cat([noise, noise.mean().expand_as(expected)]),
        )


def log_improvement(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``log(pdf(u) + u cdf(u))`` of the standard normal without underflow (Ament et al. 2023, Eq. 9)."""
    log_density = -0.5 * np.square(u) - 0.5 * math.log(2 * math.pi)
    near, far = np.maximum(u, -1.0), np.clip(u, -1e6, -1.0)
    direct = np.log(np.exp(-0.5 * np.square(near)) / math.sqrt(2 * math.pi) + near * ndtr(near))
    tail = log_density + np.log1p(far * math.sqrt(math.pi / 2) * erfcx(-far / math.sqrt(2)))
    asymptotic = log_density - 2 * np.log(np.maximum(-u, 1.0))  # of the tail, where its difference cancels
    return np.asarray(np.where(u > -1.0, direct, np.where(u > -1e3, tail, asymptotic)))
