"""Promotion: which of many cheaply scored candidates are worth an expensive evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.priors import LogNormalPrior
from scipy.stats import rankdata

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search.gp_fit import fit_hyperparameters
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

logger = logging.getLogger(__name__)

MIN_EXPENSIVE_RESULTS = 4


@dataclass(frozen=True)
class SurrogateCheck:
    """How well candidates would have been promoted, each judged from all others.

    Attributes:
        num_results: candidates with a cheap and an expensive loss.
        rank_correlation: Spearman's, of the surrogate's and the true expensive loss.
        cheap_rank_correlation: of the cheap loss alone.
        hit_rate: share of the truly best ``top_k`` among the surrogate's ``top_k``.
        cheap_hit_rate: of the cheap loss alone.
        top_k: a third of the results.
        is_used: the surrogate ranks better, and decides.
    """

    num_results: int
    rank_correlation: float
    cheap_rank_correlation: float
    hit_rate: float
    cheap_hit_rate: float
    top_k: int
    is_used: bool


class PromotionSurrogate:
    """Predicts expensive losses as cheap loss plus a Gaussian process over features of the candidate.

    Features (AutoQRA, Eq. 7): cheap loss, log bytes, predicted additive loss, importance-weighted coverages of bits
    and ranks, histograms of bits and ranks. The paper trains an MLP; with tens of results a Gaussian process on the
    residual starts from the cheap score instead of from nothing. With fewer than four expensive results, or where in
    leave-one-out the surrogate ranks no better than the cheap loss alone, the cheap loss decides.

    Args:
        problem: space, tables and budget.
        seed: of the restarts of a fit that fails.
    """

    def __init__(self, problem: SearchProblem, seed: int = 0) -> None:
        """Nothing is known yet."""
        self.problem, self.seed = problem, seed
        self._importance = ImportancePriors.from_problem(problem)
        self.check: SurrogateCheck | None = None
        self._known: set[Candidate] = set()
        self._correction: _Correction | None = None

    def fit(
        self, results: Sequence[tuple[Candidate, float | None, float | None]], *, may_correct: bool = True
    ) -> None:
        """Learn from candidates with a cheap and an expensive loss, replacing what was learned before.

        Args:
            results: candidate, cheap loss, expensive loss, nats per token. Failed trials (a loss that is None or not
                finite) teach nothing, and are not promoted again.
            may_correct: False leaves the decision to the cheap loss.
        """
        self._known = {candidate for candidate, _, _ in results}
        usable = {
            c: (cheap, expensive) for c, cheap, expensive in results if _is_finite(cheap) and _is_finite(expensive)
        }
        self._correction = None
        if may_correct and len(usable) >= MIN_EXPENSIVE_RESULTS:
            cheap, expensive = np.array(list(usable.values()), dtype=np.float64).T
            self._correction = self._fit_correction(self._features(list(usable), cheap), cheap, expensive)

    def predict(self, pool: Sequence[tuple[Candidate, float | None]]) -> list[float]:
        """Expected expensive losses, nats per token; infinite where the cheap trial failed.

        While the cheap loss decides, it is given back as is.
        """
        cheap = np.array([loss if loss is not None and _is_finite(loss) else math.inf for _, loss in pool])
        usable = np.flatnonzero(np.isfinite(cheap)).tolist()
        if self._correction is not None and len(usable):
            features = self._features([pool[index][0] for index in usable], cheap[usable])
            cheap[usable] += self._correction.residuals(features)
        return [float(loss) for loss in cheap]

    def promote(self, pool: Sequence[tuple[Candidate, float | None]], num: int) -> list[Candidate]:
        """The ``num`` candidates with the least predicted expensive loss, best first.

        Args:
            pool: candidates and their cheap losses, nats per token. Failed ones, repeats and those whose expensive
                loss is known are left out.
            num: how many to promote at most.
        """
        predicted = {candidate: loss for (candidate, _), loss in zip(pool, self.predict(pool), strict=True)}
        fresh = [c for c, loss in predicted.items() if c not in self._known and math.isfinite(loss)]
        # an accuracy of few examples is often equal; its ties are the score's to break
        return sorted(fresh, key=lambda c: (predicted[c], self.problem.predicted_loss(c)))[:num]

    def _fit_correction(
        self,
        features: npt.NDArray[np.float64],
        cheap: npt.NDArray[np.float64],
        expensive: npt.NDArray[np.float64],
    ) -> _Correction | None:
        """None where the residuals are all equal or the correction ranks no better than the cheap loss."""
        residuals = expensive - cheap
        if residuals.std() <= 1e-9 * max(1.0, np.abs(residuals).max()):
            return None
        correction = _Correction(features, residuals, self.seed)
        left_out = cheap + correction.left_out_residuals()
        top_k = max(1, len(expensive) // 3)
        ours, alone = rank_correlation(left_out, expensive), rank_correlation(cheap, expensive)
        self.check = SurrogateCheck(
            num_results=len(expensive),
            rank_correlation=ours,
            cheap_rank_correlation=alone,
            hit_rate=hit_rate(left_out, expensive, top_k),
            cheap_hit_rate=hit_rate(cheap, expensive, top_k),
            top_k=top_k,
            is_used=ours > alone,
        )
        logger.info("Promotion: %s", self.check)
        return correction if self.check.is_used else None

    def _features(self, candidates: Sequence[Candidate], cheap: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``[num_candidates, 5 + num_bits + num_ranks]``."""
        space = self.problem.space
        positions = np.asarray(candidates, dtype=np.int64)
        weights = np.column_stack([self._importance.bits, self._importance.rank]) + 1e-3
        coverages = (positions / np.maximum(space.num_rungs - 1, 1) * weights / weights.sum(axis=0)).sum(axis=1)
        bits = [(positions[..., 0] == rung).mean(axis=1) for rung in range(len(space.bit_choices))]
        ranks = [(positions[..., 1] == rung).mean(axis=1) for rung in range(len(space.rank_choices))]
        sizes = [math.log(max(1, self.problem.total_bytes(candidate))) for candidate in candidates]
        predicted = [self.problem.predicted_loss(candidate) for candidate in candidates]
        return np.column_stack([cheap, sizes, predicted, coverages, *bits, *ranks])


def hit_rate(predicted: npt.NDArray[np.float64], true: npt.NDArray[np.float64], top_k: int) -> float:
    """Share of the ``top_k`` least true losses among the ``top_k`` least predicted ones."""
    best, chosen = (set(np.argsort(losses, kind="stable")[:top_k].tolist()) for losses in (true, predicted))
    return len(best & chosen) / top_k


def rank_correlation(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Spearman's; 0 where one of the two is constant."""
    ranks = rankdata(first) - (len(first) + 1) / 2, rankdata(second) - (len(second) + 1) / 2
    norm = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return float(ranks[0] @ ranks[1]) / norm if norm > 0 else 0.0


class _Correction:
    """Gaussian process of the residuals with one lengthscale for all features (prior of arXiv 2402.02229).

    Args:
        features: ``[num_results, d]``.
        residuals: expensive minus cheap loss, nats per token, ``[num_results]``, not all equal.
        seed: of the restarts of a fit that fails.
    """

    def __init__(self, features: npt.NDArray[np.float64], residuals: npt.NDArray[np.float64], seed: int) -> None:
        """Standardize and fit."""
        self.centre, self.spread = features.mean(axis=0), features.std(axis=0)
        self.spread[self.spread < 1e-12] = 1.0
        self.offset, self.unit = float(residuals.mean()), float(residuals.std())
        log_lengthscale = math.sqrt(2) + 0.5 * math.log(features.shape[1])
        self.model = SingleTaskGP(
            self._inputs(features),
            torch.from_numpy((residuals - self.offset) / self.unit)[:, None],
            covar_module=ScaleKernel(
                MaternKernel(nu=2.5, lengthscale_prior=LogNormalPrior(log_lengthscale, math.sqrt(3)))
            ),
            outcome_transform=None,
        )
        fit_hyperparameters(self.model, seed)

    def _inputs(self, features: npt.NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy((features - self.centre) / self.spread)

    def residuals(self, features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Expected residuals, nats per token, ``[num_candidates]``."""
        with torch.no_grad():
            mean = self.model.posterior(self._inputs(features)).mean[:, 0]
        return np.asarray(mean.numpy() * self.unit + self.offset)

    def left_out_residuals(self) -> npt.NDArray[np.float64]:
        """Each residual as predicted from all others, ``[num_results]`` (Rasmussen and Williams 2006, Eq. 5.12).

        The hyperparameters are those of all results, so this flatters the model somewhat.
        """
        inputs, targets = self.model.train_inputs[0], self.model.train_targets
        with torch.no_grad():
            noise = self.model.likelihood.noise.expand_as(targets)
            precision = torch.linalg.inv(self.model.covar_module(inputs).to_dense() + torch.diag(noise))
            errors = precision @ (targets - self.model.mean_module(inputs)) / precision.diagonal()
        return np.asarray((targets - errors).numpy() * self.unit + self.offset)


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
