"""The low-rank correction of a quantization error that loses the least, and the loss it leaves, at every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peft_autoqra.errors import CalibrationError

RIGHT_ROW_NORM = math.sqrt(1 / 3)
"""Expected row norm of PEFT's ``lora_A`` after ``kaiming_uniform_(a=sqrt(5))``, whatever ``in_features`` is."""

EXACT_SIDE = 256
"""Weights whose smaller side is longer are decomposed by a randomized method, if few components are wanted."""

DAMPING = 1e-3
"""Of an :class:`InputMetric`: keeps directions that the data never showed from being free."""

GRADIENT_FLOOR = 1e-2
"""Smallest mean squared gradient of an output that is believed, as a fraction of their mean."""

_OVERSAMPLING = 32
_POWER_ITERATIONS = 5
_NEGLIGIBLE = 1e-7  # share of the largest squared singular value below which float32 holds only noise


class InputMetric:
    """Damped second moment ``H = E[x x^T] + damping * mean(diagonal) * I`` of a module's inputs.

    Make one for all modules that read the same input, and use it for all their bit-widths.

    Args:
        input_gram: ``E[x x^T]``, ``[in_features, in_features]``, float32, or its diagonal, ``[in_features]``.
        damping: a fraction of the mean diagonal.

    Raises:
        CalibrationError: H has no Cholesky factor, because damping is too small.
    """

    def __init__(self, input_gram: Tensor, damping: float = DAMPING) -> None:
        """Add the damping."""
        self.moment = input_gram.clone()  # [K, K] or [K]
        diagonal = self.moment.diagonal() if self.is_full else self.moment
        diagonal.add_(damping * diagonal.mean())

    @property
    def is_full(self) -> bool:
        """Whether H is more than its diagonal."""
        return bool(self.moment.dim() == 2)

    def apply(self, rows: Tensor) -> Tensor:
        """``rows H``, ``[n, in_features]``."""
        return rows @ self.moment if self.is_full else rows * self.moment

    def whiten(self, rows: Tensor) -> Tensor:
        """``rows C`` with ``C C^T = H``, ``[n, in_features]``."""
        return rows @ self.cholesky_factor if self.is_full else rows * self.moment.sqrt()

    def unwhiten(self, rows: Tensor) -> Tensor:
        """``rows C^-1``, ``[n, in_features]``."""
        if not self.is_full:
            return rows / self.moment.sqrt()
        result: Tensor = torch.linalg.solve_triangular(self.cholesky_factor, rows, upper=False, left=False)
        return result

    @cached_property
    def cholesky_factor(self) -> Tensor:
        """Lower triangular C with ``C C^T = H``, ``[in_features, in_features]``, float32; zero where H is."""
        if not self.moment.any():
            return self.moment
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(self.moment.double())
        if failed:
            raise CalibrationError("The input Gram is not positive definite; calibrate with more tokens or damping.")
        return factor.float()


def output_scale(output_gradient_second_moment: Tensor, gradient_floor: float = GRADIENT_FLOOR) -> Tensor:
    """Weights D of the output features: root mean square gradients, floored so that they can be divided by.

    Args:
        output_gradient_second_moment: ``E[g_i^2]``, ``[out_features]``.
        gradient_floor: smallest ``E[g_i^2]`` that is believed, as a fraction of the mean.

    Returns:
        ``[out_features]``, float32; all zero when every gradient is.
    """
    moment = output_gradient_second_moment.float()
    return moment.clamp_min(gradient_floor * float(moment.mean())).sqrt()


@dataclass(frozen=True, eq=False)
class WhitenedError:
    """Decomposition of the whitened error ``E = D (W - Q) H^1/2``; made by :func:`whiten_error`.

    The best ``left @ right`` of rank r under ``||D (W - Q - left @ right) H^1/2||_F`` keeps the r largest singular
    values of E and maps them back (Eckart & Young 1936; with D = 1 it is CALDERA's and QERA's correction).

    Attributes:
        squared_singular_values: descending, ``[k]``, float64; all ``m = min(out_features, in_features)``, or the
            largest ones.
        vectors: singular vectors of E's smaller side as columns, ``[m, k]``.
        rest: sum of the squared singular values that are not listed.
        scaled_error: ``D (W - Q)``, ``[out_features, in_features]``.
        scale: D, ``[out_features]``.
        metric: H.
    """

    squared_singular_values: Tensor
    vectors: Tensor
    rest: float
    scaled_error: Tensor
    scale: Tensor
    metric: InputMetric

    def residuals(self, max_rank: int) -> Tensor:
        """Squared error that the best correction of each rank leaves, ``[max_rank + 1]``, float64.

        Entry 0 is the error without correction; ranks from ``min(out_features, in_features)`` on leave nothing.
        """
        num_values = len(self.squared_singular_values)
        result = self.squared_singular_values.new_zeros(max(max_rank, num_values) + 1)
        result[:num_values] = self.squared_singular_values.flip(0).cumsum(0).flip(0)
        return result[: max_rank + 1] + self.rest

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best correction of one rank, balanced as the start of a LoRA adapter.

        Rows of ``right`` have the norm of a freshly initialized ``lora_A`` and ``left`` carries the magnitude, so
        that training moves the adapter as fast as an ordinary one. Components do not depend on the rank: the first r
        of a larger correction are the best correction of rank r. Components without measurable error (also those
        above ``min(out_features, in_features)``) get a random row of ``right`` and zeros in ``left``: they start as
        ordinary LoRA does and can be trained.

        Returns:
            left ``[out_features, rank]`` and right ``[rank, in_features]``, float32. An adapter that scales its
            product has to divide one of them by its scaling.
        """
        values = self.squared_singular_values
        kept = min(rank, int((values > _NEGLIGIBLE * values[:1]).sum()))
        left, right = self._components(kept)
        norm = right.norm(dim=1)  # [kept]
        left = torch.cat((left * (norm / RIGHT_ROW_NORM), left.new_zeros(len(left), rank - kept)), dim=1)
        right = torch.cat((right * (RIGHT_ROW_NORM / norm)[:, None], _fresh_rows(rank - kept, right)))
        return left, right

    def _components(self, count: int) -> tuple[Tensor, Tensor]:
        """Unbalanced factors of the largest components, ``[out_features, count]`` and ``[count, in_features]``."""
        vectors = self.vectors[:, :count]
        if _is_wide(self.scaled_error):  # E = U S V^T: left = D^-1 U, right = U^T D (W - Q) = S V^T H^-1/2
            return vectors / self.scale[:, None], vectors.T @ self.scaled_error
        # left = D^-1 E V = D^-1 U S, right = V^T H^-1/2
        return self.metric.whiten(self.scaled_error) @ vectors / self.scale[:, None], self.metric.unwhiten(vectors.T)


def whiten_error(error: Tensor, metric: InputMetric, scale: Tensor, max_rank: int | None = None) -> WhitenedError:
    """Decompose a quantization error by the eigenvectors of the smaller Gram of ``E = D (W - Q) C``, ``C C^T = H``.

    Where the weight is not taller than wide, that is ``E E^T = D (W - Q) H (W - Q)^T D``, which needs no factor of H.

    Args:
        error: ``W - Q``, ``[out_features, in_features]``.
        metric: H, of the module's inputs.
        scale: D, ``[out_features]``, from :func:`output_scale`.
        max_rank: components that will be asked for; None keeps all. Where that is few of many, they are found by
            subspace iteration from a random start (Halko, Martinsson & Tropp 2011, algorithm 4.4; a fixed seed),
            which leaves slightly more error than the best ones do and says so in its residuals.
    """
    scaled = error.float() * scale[:, None]
    if _is_wide(scaled):
        gram = metric.apply(scaled) @ scaled.T
    else:
        whitened = metric.whiten(scaled)
        gram = whitened.T @ whitened
    if max_rank is not None and len(gram) > max(EXACT_SIDE, 4 * (max_rank + _OVERSAMPLING)):
        values, vectors = _largest(gram, max_rank)
        rest = max(float(gram.diagonal().double().sum() - values.sum()), 0.0)
        return WhitenedError(values, vectors, rest, scaled, scale, metric)
    values, vectors = torch.linalg.eigh(gram)
    return WhitenedError(values.flip(0).double().clamp_min(0), vectors.flip(1), 0.0, scaled, scale, metric)


def _largest(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Approximately the largest eigenvalues, ``[count]``, float64, and their eigenvectors, ``[m, count]``."""
    if count == 0:
        return gram.new_zeros(0, dtype=torch.float64), gram[:, :0]
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(gram), count + _OVERSAMPLING, generator=generator).to(gram.device)
    for _ in range(_POWER_ITERATIONS):
        vectors, _ = torch.linalg.qr(gram @ vectors)
    # Rayleigh-Ritz: what the subspace holds of the true Gram, never more than the best one does
    values, rotation = torch.linalg.eigh(vectors.T @ gram @ vectors)
    return values.flip(0)[:count].double().clamp_min(0), (vectors @ rotation).flip(1)[:, :count]


def _is_wide(error: Tensor) -> bool:
    return error.shape[0] <= error.shape[1]


def _fresh_rows(num_rows: int, like: Tensor) -> Tensor:
    """Rows drawn as PEFT draws ``lora_A``, ``[num_rows, in_features]``; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    bound = 1 / math.sqrt(like.shape[1])
    rows = torch.rand(num_rows, like.shape[1], generator=generator) * (2 * bound) - bound
    return rows.to(like.device)
