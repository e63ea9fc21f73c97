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

_NEGLIGIBLE = 1e-7  # share of the largest squared singular value below which float32 holds only noise


class InputMetric:
    """Damped second moment ``H = E[x x^T] + damping * mean(diagonal) * I`` of a module's inputs.

    Make one for all modules that read the same input, and use it for all their bit-widths.

    Args:
        input_gram: ``E[x x^T]``, ``[in_features, in_features]``, float32.
        damping: keeps directions that the data never showed from being free; a fraction of the mean diagonal.

    Raises:
        CalibrationError: H has no Cholesky factor, because damping is too small.
    """

    def __init__(self, input_gram: Tensor, damping: float) -> None:
        """Add the damping."""
        self.moment = input_gram.clone()  # [K, K]
        self.moment.diagonal().add_(damping * input_gram.diagonal().mean())

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


def output_scale(output_gradient_second_moment: Tensor, gradient_floor: float) -> Tensor:
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
        squared_singular_values: descending, ``[m]`` with ``m = min(out_features, in_features)``, float64.
        vectors: singular vectors of E's smaller side as columns, ``[m, m]``.
        scaled_error: ``D (W - Q)``, ``[out_features, in_features]``.
        scale: D, ``[out_features]``.
        metric: H.
    """

    squared_singular_values: Tensor
    vectors: Tensor
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
        return result[: max_rank + 1]

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
        kept = min(rank, int((values > _NEGLIGIBLE * values[0]).sum()))
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
        factor = self.metric.cholesky_factor  # left = D^-1 E V = D^-1 U S, right = V^T H^-1/2
        right = torch.linalg.solve_triangular(factor, vectors.T, upper=False, left=False)
        return self.scaled_error @ (factor @ vectors) / self.scale[:, None], right


def whiten_error(error: Tensor, metric: InputMetric, scale: Tensor) -> WhitenedError:
    """Decompose a quantization error by the eigenvectors of the smaller Gram of ``E = D (W - Q) C``, ``C C^T = H``.

    Where the weight is not taller than wide, that is ``E E^T = D (W - Q) H (W - Q)^T D``, which needs no factor of H.

    Args:
        error: ``W - Q``, ``[out_features, in_features]``.
        metric: H, of the module's inputs.
        scale: D, ``[out_features]``, from :func:`output_scale`.
    """
    scaled = error.float() * scale[:, None]
    if _is_wide(scaled):
        gram = scaled @ metric.moment @ scaled.T
    else:
        whitened = scaled @ metric.cholesky_factor
        gram = whitened.T @ whitened
    values, vectors = torch.linalg.eigh(gram)
    return WhitenedError(values.flip(0).double().clamp_min(0), vectors.flip(1), scaled, scale, metric)


def _is_wide(error: Tensor) -> bool:
    return error.shape[0] <= error.shape[1]


def _fresh_rows(num_rows: int, like: Tensor) -> Tensor:
    """Rows drawn as PEFT draws ``lora_A``, ``[num_rows, in_features]``; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    bound = 1 / math.sqrt(like.shape[1])
    rows = torch.rand(num_rows, like.shape[1], generator=generator) * (2 * bound) - bound
    return rows.to(like.device)
