"""Priors that know nothing, for rivals that are to see no more of the problem than its bytes."""

from __future__ import annotations

import numpy as np

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search_problem import SearchProblem


def flat_priors(problem: SearchProblem) -> ImportancePriors:
    """Every step of every ladder is as important as any other."""
    steps = np.ones((*problem.loss_table.shape, 2))
    steps[:, 0, :, 0] = np.inf
    steps[:, :, 0, 1] = np.inf
    even = np.full(problem.space.num_groups, 0.5)
    return ImportancePriors(even, even, steps)
