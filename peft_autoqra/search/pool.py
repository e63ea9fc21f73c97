"""A recorded set of candidates in place of the whole space."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate


class CandidatePool:
    """Maps candidates to those that can be evaluated; without any, every candidate is its own.

    Args:
        problem: its bytes weigh the distance: a rung of a large group counts for more.
        candidates: that can be evaluated.
    """

    def __init__(self, problem: SearchProblem, candidates: Sequence[Candidate] = ()) -> None:
        """Lay them out."""
        self.candidates = tuple(candidates)
        self._positions = np.asarray(self.candidates, dtype=np.int64)
        sizes = np.ptp(problem.bytes_table, axis=(1, 2)).astype(np.float64)
        self._weights = sizes / max(sizes.sum(), 1.0)

    def nearest(self, candidate: Candidate, taken: Collection[Candidate] = ()) -> Candidate:
        """The candidate itself, or the nearest of the pool that is not taken (of all, where all are)."""
        if not self.candidates:
            return candidate
        distances = np.abs(self._positions - np.asarray(candidate)).sum(axis=2) @ self._weights
        refused = set(taken)
        order = np.argsort(distances, kind="stable").tolist()
        return self.candidates[next((i for i in order if self.candidates[i] not in refused), order[0])]
