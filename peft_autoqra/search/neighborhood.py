"""Discrete local search over ladders: atomic edits, and pairs of them that keep the budget together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import repair
from peft_autoqra.search_problem import SearchProblem

Positions = npt.NDArray[np.int64]
"""Ladder positions of many candidates, ``[num_candidates, num_groups, 2]``."""

Score = Callable[[Positions], npt.NDArray[np.float64]]
"""Larger is better; ``[num_candidates, num_groups, 2]`` to ``[num_candidates]``."""

NUM_PAIRED_STEPS = 16
MAX_MOVES = 32
STEPS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [-1, 1], [1, -1]])
"""One rung on one ladder (AutoQRA, Eq. 11), or one up on one ladder and one down on the other."""


def total_bytes(problem: SearchProblem, positions: Positions) -> npt.NDArray[np.int64]:
    """Exact bytes of many candidates, ``[num_candidates]``."""
    groups = np.arange(positions.shape[1])
    sizes = problem.bytes_table[groups, positions[..., 0], positions[..., 1]]
    return np.asarray(sizes.sum(axis=1) + problem.fixed_bytes)


def keys(positions: Positions) -> list[bytes]:
    """One hashable key per candidate."""
    return [row.tobytes() for row in positions.astype(np.int8)]


@dataclass(frozen=True, eq=False)
class Region:
    """The candidates that may be proposed: within the budget, near a centre, not taken.

    Attributes:
        problem: space, tables and budget.
        centre: ladder positions, ``[num_groups, 2]``.
        length: most atomic edits from the centre.
        taken: keys of the candidates that were asked for or told before.
    """

    problem: SearchProblem
    centre: npt.NDArray[np.int64]
    length: float
    taken: AbstractSet[bytes]

    def contains(self, positions: Positions) -> npt.NDArray[np.bool_]:
        """Which candidates are near and may be proposed, ``[num_candidates]``."""
        return np.asarray(self.is_near(positions) & self.may_propose(positions))

    def may_propose(self, positions: Positions) -> npt.NDArray[np.bool_]:
        """Which candidates keep the budget, have an adapter and are not taken, near or not, ``[num_candidates]``."""
        allowed = np.array([key not in self.taken for key in keys(positions)], dtype=bool)
        allowed &= total_bytes(self.problem, positions) <= self.problem.budget_bytes
        choices = self.problem.space.rank_choices
        if choices[0] == 0 and choices[-1] > 0:
            allowed &= (positions[..., 1] > 0).any(axis=1)
        return np.asarray(allowed)

    def is_near(self, positions: Positions) -> npt.NDArray[np.bool_]:
        """Which candidates are at most ``length`` edits from the centre, ``[num_candidates]``."""
        return np.asarray(np.abs(positions - self.centre).sum(axis=(1, 2)) <= self.length)

    def towards(self, target: npt.NDArray[np.int64], importance: ImportancePriors) -> npt.NDArray[np.int64]:
        """As far from the centre towards a target as the region reaches, within the budget.

        Groups move whole, those first whose move gains most in the additive estimate; then the budget is repaired,
        which may lead out of the region: the centre is given then.
        """
        moves = np.abs(target - self.centre).sum(axis=1)
        if moves.sum() <= self.length:
            return target
        groups = np.arange(len(target))
        loss, start = self.problem.loss_table, self.centre
        gain = loss[groups, start[:, 0], start[:, 1]] - loss[groups, target[:, 0], target[:, 1]]
        order = np.argsort(-gain / np.maximum(moves, 1), kind="stable")
        reached = np.cumsum(moves[order]) <= self.length
        position = self.centre.copy()
        position[order[reached]] = target[order[reached]]
        space = self.problem.space
        repaired = space.as_array(repair(self.problem, space.from_array(position), importance))
        return repaired if self.is_near(repaired[None])[0] else self.centre


def single_edits(problem: SearchProblem, position: npt.NDArray[np.int64]) -> Positions:
    """All edits of one group that stay on its ladders, within the budget or not."""
    num_groups = len(position)
    groups, steps = np.repeat(np.arange(num_groups), len(STEPS)), np.tile(STEPS, (num_groups, 1))
    targets = position[groups] + steps
    valid = ((targets >= 0) & (targets < problem.space.num_rungs[groups])).all(axis=1)
    edited = np.repeat(position[None], int(valid.sum()), axis=0)
    edited[np.arange(len(edited)), groups[valid]] = targets[valid]
    return edited


def paired_edits(
    problem: SearchProblem, position: npt.NDArray[np.int64], edits: Positions, values: npt.NDArray[np.float64]
) -> Positions:
    """Pairs of one edit that breaks the budget and one of another group that pays for it.

    The optimum sits at the edge of the budget, where hardly any single edit upwards fits. Of each kind the
    ``NUM_PAIRED_STEPS`` edits with the best values are paired, for payers among those that save enough.

    Args:
        problem: space, tables and budget.
        position: what is edited, ``[num_groups, 2]``.
        edits: from :func:`single_edits`.
        values: their scores, ``[num_edits]``.
    """
    growth = total_bytes(problem, edits) - total_bytes(problem, position[None])
    slack = problem.budget_bytes - int(total_bytes(problem, position[None])[0])
    order = np.argsort(-values, kind="stable")
    breaking = order[growth[order] > slack][:NUM_PAIRED_STEPS]
    saving = order[growth[order] < 0]
    changed = np.abs(edits - position).sum(axis=2).argmax(axis=1)
    pairs = []
    for up in breaking:
        enough = saving[(growth[saving] + growth[up] <= slack) & (changed[saving] != changed[up])]
        pairs.append(edits[up] + edits[enough[:NUM_PAIRED_STEPS]] - position)
    return np.concatenate(pairs) if pairs else edits[:0]


def local_search(region: Region, start: npt.NDArray[np.int64], score: Score) -> tuple[npt.NDArray[np.int64], float]:
    """Climb to a candidate of the region that no single or paired edit improves.

    Args:
        region: what may be returned.
        start: within the budget and near the centre, taken or not, ``[num_groups, 2]``.
        score: to be maximized.

    Returns:
        The candidate and its score, which is minus infinity where neither the start nor anything beside it is free.
    """
    position, value = start, _scores_within(region, start[None], score)[0]
    for _ in range(MAX_MOVES):
        edits = single_edits(region.problem, position)
        if not len(edits):
            break
        values = score(edits)
        pairs = paired_edits(region.problem, position, edits, values)
        values = np.concatenate(
            [np.where(region.contains(edits), values, -np.inf), _scores_within(region, pairs, score)]
        )
        best = int(values.argmax())
        if values[best] <= value:
            break
        position, value = np.concatenate([edits, pairs])[best], values[best]
    return position, float(value)


def _scores_within(region: Region, positions: Positions, score: Score) -> npt.NDArray[np.float64]:
    """Scores, minus infinity outside of the region, ``[num_candidates]``."""
    values = np.full(len(positions), -np.inf)
    inside = region.contains(positions)
    if inside.any():
        values[inside] = score(positions[inside])
    return values
