"""Gaussian process of the true loss around the additive proxy, over candidates and fidelities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from botorch.models import SingleTaskGP
from linear_operator.utils.cholesky import psd_safe_cholesky
from scipy.special import erfcx, ndtr

from peft_autoqra.search.embedding import OrdinalEmbedding
from peft_autoqra.search.gp_fit import fit_hyperparameters, jitter_allowed
from peft_autoqra.search.loss_features import LossFeatures
from peft_autoqra.search.loss_kernels import BlockLinearKernel, ProxyMean, loss_kernel

MIN_NOISE_VARIANCE = 1e-4  # of standardized losses; below it, covariances of near-identical candidates are singular
MIN_VARIANCE = 1e-10
PROXY_DISTRUST = 0.1  # of a predicted rise, by which the truth may well differ

Hyperparameters = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class LossData:
    """Observed candidates.

    Attributes:
        positions: ladder positions, ``[num_observations, num_groups, 2]``.
        losses: nats per token, or of another objective, ``[num_observations]``.
        standard_errors: of the losses, NaN where unknown, ``[num_observations]``.
        levels: fidelities, 0 is the cheapest, ``[num_observations]``.
        num_levels: of fidelities; predictions are for the last.
        in_nats: the losses are in the unit of the predicted ones; another objective's are of a scale to be learned.
    """

    positions: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    standard_errors: npt.NDArray[np.float64]
    levels: npt.NDArray[np.int64]
    num_levels: int = 1
    in_nats: bool = True


@dataclass(frozen=True, eq=False)
class LossScaling:
    """Losses to standardized units and back: ``standardized = (loss - offset) / unit``, by fidelity.

    Attributes:
        offset: mean observed loss, ``[num_levels]``.
        unit: standard deviation of the observed losses, or ``PROXY_DISTRUST`` of the mean predicted rise where that
            is more (candidates that happen to be close do not make the model sure of all others), ``[num_levels]``.
            Of losses that are not in nats, their standard deviation, or their standard error where that is more:
            accuracies of few examples are often equal.
        predicted_unit: likewise of predictions: ``unit`` again where losses are in nats, else their own standard
            deviation, so that the prior expects a spread of predictions to make a spread of losses.
        predicted_offset: mean prediction, ``[num_levels]``.
        column_offset: mean columns of :class:`LossFeatures`, ``[num_levels, num_columns]``.
    """

    offset: npt.NDArray[np.float64]
    unit: npt.NDArray[np.float64]
    predicted_unit: npt.NDArray[np.float64]
    predicted_offset: npt.NDArray[np.float64]
    column_offset: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, data: LossData, predicted: npt.NDArray[np.float64], columns: npt.NDArray[np.float64]) -> LossScaling:
        """From observed losses, their predictions ``[num_observations]`` and their columns.

        A fidelity without observations takes the figures of the most expensive one that has some.
        """
        last = data.levels.max()
        members = [
            data.levels == (level if (data.levels == level).any() else last) for level in range(data.num_levels)
        ]
        if data.in_nats:
            units = predicted_units = [_unit(data.losses[m], predicted[m]) for m in members]
        else:
            units = [_own_unit(data.losses[m], data.standard_errors[m]) for m in members]
            predicted_units = [_unit(predicted[m], predicted[m]) for m in members]
        return cls(
            np.array([data.losses[m].mean() for m in members]),
            np.array(units),
            np.array(predicted_units),
            np.array([predicted[m].mean() for m in members]),
            np.stack([columns[m].mean(axis=0) for m in members]),
        )


def _unit(losses: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> float:
    resolution = 1e-9 * max(1.0, float(np.abs(losses).max()))
    return max(float(losses.std()), PROXY_DISTRUST * float(np.abs(predicted).mean()), resolution)


def _own_unit(losses: npt.NDArray[np.float64], standard_errors: npt.NDArray[np.float64]) -> float:
    known = standard_errors[np.isfinite(standard_errors)]
    noise = float(np.sqrt(np.square(known).mean())) if len(known) else 0.0
    return max(float(losses.std()), noise, 1e-9 * max(1.0, float(np.abs(losses).max())))


class ProxyGP:
    """Posterior over the true loss, ``y = a + b * predicted + linear(features) + GP(embedding)``, float64.

    Args:
        embedding: of the search problem.
        features: likewise.
        data: what was observed. Unknown standard errors are taken to be as large as the known ones on average; where
            none is known the noise is learned.
        hyperparameters: of an earlier model of the same problem, to be taken over as they are; None fits them.
    """

    def __init__(
        self,
        embedding: OrdinalEmbedding,
        features: LossFeatures,
        data: LossData,
        hyperparameters: Hyperparameters | None = None,
    ) -> None:
        """Standardize, and fit the hyperparameters by maximum a posteriori."""
        self.embedding, self.features, self.top = embedding, features, data.num_levels - 1
        predicted = embedding.predicted_losses(data.positions)
        self.scaling = LossScaling.fit(data, predicted, features.transform_positions(data.positions))
        num_embedded = embedding.num_group_columns + embedding.num_coverage_columns
        self._linear = range(num_embedded, num_embedded + features.num_columns)
        levels = range(self._linear.stop, self._linear.stop + self.top)
        losses = (data.losses - self.scaling.offset[data.levels]) / self.scaling.unit[data.levels]
        self.model = SingleTaskGP(
            self._inputs(data.positions, data.levels),
            torch.from_numpy(losses)[:, None],
            train_Yvar=self._noise_variances(data.standard_errors / self.scaling.unit[data.levels]),
            covar_module=loss_kernel(
                range(embedding.num_group_columns),
                range(embedding.num_group_columns, num_embedded),
                features.block_of_column,
                self._linear,
                levels,
            ),
            mean_module=ProxyMean(levels),
            outcome_transform=None,
        )
        if hyperparameters is None:
            fit_hyperparameters(self.model, seed=0)
        else:
            self._take_over(hyperparameters)
        inputs, targets = self.model.train_inputs[0], self.model.train_targets
        self._condition(inputs, targets, self.model.likelihood.noise.detach().expand_as(targets))

    @property
    def hyperparameters(self) -> Hyperparameters:
        """What was fitted."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def _take_over(self, hyperparameters: Hyperparameters) -> None:
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if name in hyperparameters:
                    value.copy_(hyperparameters[name])
        self.model.eval()

    def _inputs(self, positions: npt.NDArray[np.int64], levels: npt.NDArray[np.int64] | None = None) -> torch.Tensor:
        """Embedding, features, level indicators and prediction, standardized, ``[num_candidates, d]``."""
        if levels is None:
            levels = np.full(len(positions), self.top)
        unit = self.scaling.predicted_unit[levels]
        predicted = self.embedding.predicted_losses(positions) - self.scaling.predicted_offset[levels]
        columns = self.features.transform_positions(positions) - self.scaling.column_offset[levels]
        demand = self.features.columns("demand")
        columns[:, : demand.start] /= unit[:, None]
        indicators = (levels[:, None] == np.arange(self.top)).astype(np.float64)
        embedded = self.embedding.transform_positions(positions)
        return torch.from_numpy(np.column_stack([embedded, columns, indicators, predicted / unit]))

    def _noise_variances(self, standard_errors: npt.NDArray[np.float64]) -> torch.Tensor | None:
        """Standardized, ``[num_observations, 1]``; None to have the noise learned."""
        variances = np.square(standard_errors)
        known = np.isfinite(variances)
        if not known.any():
            return None
        variances = np.where(known, variances, variances[known].mean())
        return torch.from_numpy(np.maximum(variances, MIN_NOISE_VARIANCE))[:, None]

    def _condition(self, inputs: torch.Tensor, targets: torch.Tensor, noise: torch.Tensor) -> None:
        """Factorize the covariance of ``[n, d]`` inputs, so that posteriors are two products.

        GPyTorch's own posterior of thousands of single candidates copies the training data for each of them.
        """
        self._conditioned = (inputs, targets, noise)
        with torch.no_grad(), jitter_allowed():
            covariance = self.model.covar_module(inputs).to_dense() + torch.diag(noise)
            self._cholesky = psd_safe_cholesky(covariance)
            residuals = (targets - self.model.mean_module(inputs))[:, None]
            self._residual_weights = torch.cholesky_solve(residuals, self._cholesky)

    def posterior(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Expected loss at the last fidelity and its standard deviation without observation noise.

        Args:
            positions: ``[num_candidates, num_groups, 2]``.

        Returns:
            In the unit of the losses, each ``[num_candidates]``.
        """
        inputs = self._inputs(positions)
        with torch.no_grad():
            cross = self.model.covar_module(inputs, self._conditioned[0]).to_dense()
            mean = self.model.mean_module(inputs) + (cross @ self._residual_weights)[:, 0]
            explained = torch.linalg.solve_triangular(self._cholesky, cross.T, upper=False).square().sum(dim=0)
            prior = self.model.covar_module(inputs, diag=True)
            deviation = (prior - explained).clamp_min(MIN_VARIANCE).sqrt()
        unit, offset = self.scaling.unit[self.top], self.scaling.offset[self.top]
        return np.asarray(mean.numpy() * unit + offset), np.asarray(deviation.numpy() * unit)

    def log_expected_improvement(self, positions: npt.NDArray[np.int64], best_loss: float) -> npt.NDArray[np.float64]:
        """Log of the expected improvement below ``best_loss`` (AutoQRA, Eq. 10), log nats, ``[num_candidates]``."""
        mean, deviation = self.posterior(positions)
        return np.asarray(np.log(deviation) + log_improvement((best_loss - mean) / deviation))

    def believe(self, positions: npt.NDArray[np.int64]) -> None:
        """Condition on candidates under evaluation as if they gave their expected loss (kriging believer)."""
        inputs, targets, noise = self._conditioned
        unit, offset = self.scaling.unit[self.top], self.scaling.offset[self.top]
        expected = torch.from_numpy((self.posterior(positions)[0] - offset) / unit)
        self._condition(
            torch.cat([inputs, self._inputs(positions)]),
            torch.cat([targets, expected]),
            torch.cat([noise, noise.mean().expand_as(expected)]),
        )

    def corrected_table(self, rng: np.random.Generator | None = None) -> npt.NDArray[np.float64]:
        """The additive loss table as the linear part corrects it, ``[num_groups, num_bits, num_ranks]``, nats.

        Args:
            rng: draws the correction from its posterior (Thompson 1933; by Matheron's rule); None takes its mean.
        """
        linear: BlockLinearKernel = self.model.covar_module.kernels[0]
        mean: ProxyMean = self.model.mean_module
        inputs, targets, _ = self._conditioned
        with torch.no_grad():
            columns = inputs[:, self._linear.start : self._linear.stop]  # [n, num_columns]
            variances = linear.deviations.square()
            prior = torch.zeros_like(variances)
            residuals = targets - mean(inputs)
            if rng is not None:
                prior = torch.from_numpy(rng.normal(size=len(variances))) * linear.deviations
                covariance = self._cholesky @ self._cholesky.T - (columns * variances) @ columns.T
                values, vectors = torch.linalg.eigh(covariance)
                rest = vectors @ (values.clamp_min(0).sqrt() * torch.from_numpy(rng.normal(size=len(values))))
                residuals = residuals - columns @ prior - rest
            weights = prior + variances * (columns.T @ torch.cholesky_solve(residuals[:, None], self._cholesky))[:, 0]
            scale = float(mean.log_scales[0].exp())
        return self.features.corrected_table(weights.numpy(), scale, float(self.scaling.predicted_unit[self.top]))


def log_improvement(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``log(pdf(u) + u cdf(u))`` of the standard normal without underflow (Ament et al. 2023, Eq. 9)."""
    log_density = -0.5 * np.square(u) - 0.5 * math.log(2 * math.pi)
    near, far = np.maximum(u, -1.0), np.clip(u, -1e6, -1.0)
    direct = np.log(np.exp(-0.5 * np.square(near)) / math.sqrt(2 * math.pi) + near * ndtr(near))
    tail = log_density + np.log1p(far * math.sqrt(math.pi / 2) * erfcx(-far / math.sqrt(2)))
    asymptotic = log_density - 2 * np.log(np.maximum(-u, 1.0))  # of the tail, where its difference cancels
    return np.asarray(np.where(u > -1.0, direct, np.where(u > -1e3, tail, asymptotic)))
