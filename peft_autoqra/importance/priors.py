"""AutoQRA's importance priors, and the candidate that is rounded from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate, SearchSpace


@dataclass(frozen=True, eq=False)
class ImportancePriors:
    """How much each group needs bits and rank (AutoQRA, Sec. 3.1).

    Attributes:
        bits: I_q, rise of the loss when the group is quantized hardest, scaled to [0, 1], ``[num_groups]``.
        rank: I_r, gain of the largest rank over the smallest at the fewest bits, scaled to [0, 1], ``[num_groups]``.
        steps: importance of the step that leads down from each choice on the bit (last index 0) and the rank (1)
            ladder, ``[num_groups, num_bits, num_ranks, 2]``; the step below the lowest rung is infinite.
    """

    bits: npt.NDArray[np.float64]
    rank: npt.NDArray[np.float64]
    steps: npt.NDArray[np.float64]

    @classmethod
    def from_problem(cls, problem: SearchProblem) -> ImportancePriors:
        """The paper's priors, one importance per group for every step of a ladder."""
        bits, rank = _bit_rises(problem), _rank_gains(problem)
        bits, rank = _scale(bits), _scale(rank)
        steps = np.empty((*problem.loss_table.shape, 2))
        steps[..., 0], steps[..., 1] = bits[:, None, None], rank[:, None, None]
        return cls(bits, rank, _without_lowest_steps(steps))

    @classmethod
    def from_marginal_losses(cls, problem: SearchProblem) -> ImportancePriors:
        """The same priors, but every step priced by the loss that the table says it costs.

        A step from 3 to 2 bits costs some ten times a step from 8 to 4; one number per group cannot say so.
        """
        paper = cls.from_problem(problem)
        steps = np.zeros((*problem.loss_table.shape, 2))
        steps[:, 1:, :, 0] = -np.diff(problem.loss_table, axis=1)
        steps[:, :, 1:, 1] = -np.diff(problem.loss_table, axis=2)
        unit = steps.max() or 1.0
        return cls(paper.bits, paper.rank, _without_lowest_steps(np.maximum(steps, 0.0) / unit))


def _bit_rises(problem: SearchProblem) -> npt.NDArray[np.float64]:
    return np.asarray(problem.loss_table[:, 0, 0] - problem.loss_table[:, -1, 0])


def _rank_gains(problem: SearchProblem) -> npt.NDArray[np.float64]:
    largest = np.array([problem.space.num_ranks(index) - 1 for index in range(problem.space.num_groups)])
    return np.asarray(problem.loss_table[:, 0, 0] - problem.loss_table[np.arange(len(largest)), 0, largest])


def _scale(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Min-max to [0, 1]; equal values say nothing about an order and become one half."""
    spread = values.max() - values.min()
    if spread <= 0:
        return np.full_like(values, 0.5)
    return np.asarray((values - values.min()) / spread)


def _without_lowest_steps(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    steps[:, 0, :, 0] = np.inf
    steps[:, :, 0, 1] = np.inf
    return steps


def round_priors(space: SearchSpace, importance: ImportancePriors) -> Candidate:
    """Ladder positions rounded from the priors (AutoQRA, Eq. 6); may be above the budget."""
    top_bit = len(space.bit_choices) - 1
    return tuple(
        (round(top_bit * float(bits)), round((space.num_ranks(index) - 1) * float(rank)))
        for index, (bits, rank) in enumerate(zip(importance.bits, importance.rank, strict=True))
    )
