"""Ordinal embedding of candidates for Gaussian processes (AutoQRA, Eq. 9), scaled so that hundreds of groups work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

SHARE_FLOOR = 0.05  # part of the weight that is spread evenly, so that no group is invisible


class OrdinalEmbedding:
    """Candidates as points: weighted ladder positions of every group, then coverages of the whole candidate.

    The first ``2 * num_groups`` columns are ladder positions scaled to [0, 1] and multiplied by the square root of
    the group's share of the importance (I_q for bits, I_r for ranks). Shares sum to one, so the squared distance of
    two candidates is a weighted mean of squared ladder distances and lies in [0, 2] for 5 groups as for 500. For equal
    shares that is the same as a lengthscale that grows with the square root of the dimension, which keeps plain
    Gaussian processes working in high dimension (Hvarfner et al. 2024, arXiv 2402.02229). For unequal shares, moves
    of groups that hardly matter are short, so tens of observations generalize over them; one lengthscale serves all
    columns, where one per column (420 of them at 210 modules) could not be learned.

    The last columns say in a few numbers where a candidate stands and are what can be learned first: the coverages
    of Eq. 9 (mean ladder position weighted by importance, for bits and for ranks), and the predicted loss by bit
    rung, ``sum of loss[g] over groups at that rung``: a proxy that is wrong at 2 bits is wrong there for all groups.

    Args:
        problem: space and loss table.
        importance: priors of the groups.
    """

    def __init__(self, problem: SearchProblem, importance: ImportancePriors) -> None:
        """Compute the column weights."""
        self.problem = problem
        self.num_group_columns = 2 * problem.space.num_groups
        self.num_coverage_columns = 2 + len(problem.space.bit_choices)
        self._tops = np.maximum(problem.space.num_rungs - 1, 1)
        self._shares = np.column_stack([_shares(importance.bits), _shares(importance.rank)])
        self._loss_unit = float(np.ptp(problem.loss_table, axis=(1, 2)).sum()) or 1.0

    def transform(self, candidates: Sequence[Candidate]) -> npt.NDArray[np.float64]:
        """Embed, ``[num_candidates, num_group_columns + num_coverage_columns]``."""
        return self.transform_positions(np.asarray(candidates, dtype=np.int64))

    def transform_positions(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The same from ladder positions ``[num_candidates, num_groups, 2]``."""
        scaled = positions / self._tops
        group_columns = (scaled * np.sqrt(self._shares)).reshape(len(positions), self.num_group_columns)
        coverages = (scaled * self._shares).sum(axis=1)
        return np.concatenate([group_columns, coverages, self._losses_by_rung(positions)], axis=1)

    def predicted_losses(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Additive loss estimate, nats per token, ``[num_candidates]``."""
        return np.asarray(self._group_losses(positions).sum(axis=1))

    def _group_losses(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        groups = np.arange(positions.shape[1])
        return self.problem.loss_table[groups, positions[..., 0], positions[..., 1]]

    def _losses_by_rung(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        losses, bits = self._group_losses(positions) / self._loss_unit, positions[..., 0]
        rungs = range(len(self.problem.space.bit_choices))
        return np.stack([np.where(bits == rung, losses, 0.0).sum(axis=1) for rung in rungs], axis=1)


def _shares(importance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Importance as shares of one, a small part of it spread evenly, ``[num_groups]``."""
    even = np.full_like(importance, 1.0 / len(importance))
    total = importance.sum()
    return (1 - SHARE_FLOOR) * importance / total + SHARE_FLOOR * even if total > 0 else even
