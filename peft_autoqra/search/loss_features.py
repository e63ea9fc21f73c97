"""Quantities that the true loss is linear in, if the additive estimate is wrong in ways that groups share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peft_autoqra.search_problem import SearchProblem


class LossFeatures:
    """Where the predicted loss of a candidate comes from, as columns in blocks.

    To second order the loss rises by a quadratic form in the groups' perturbations, whose sizes are ``sqrt(l_g)`` with
    ``l_g`` the predicted loss of the group's choice, above the least it can have. The additive estimate keeps the
    diagonal, at factor one. These columns let a linear model correct what it gets wrong in common:

    - ``bits``, ``ranks``: sum of ``l_g`` over the groups at each rung (a bit-width or rank that is mis-scored);
    - ``kinds``: the same over each kind of group (all value projections, say);
    - ``depth``: ``l_g`` weighted by position, linear and quadratic (early or late layers mis-scored);
    - ``groups``: each ``l_g`` by itself;
    - ``neighbors``: ``sqrt(l_g l_h)`` of groups that follow each other (off-diagonal terms);
    - ``demand``: share of the groups at each rank rung, in no loss at all (what a rank is worth to the task).

    Args:
        problem: space and loss table.
    """

    BLOCKS = ("bits", "ranks", "kinds", "depth", "groups", "neighbors", "demand")

    def __init__(self, problem: SearchProblem) -> None:
        """Shift the table so that the best choice of every group costs nothing."""
        space = problem.space
        self.problem = problem
        allowed = space.allowed_choices()
        least = np.where(allowed, problem.loss_table, np.inf).min(axis=(1, 2), keepdims=True)
        self._losses = np.maximum(problem.loss_table - least, 0.0)
        kinds = [group.kind for group in space.groups]
        self._kinds = np.stack([np.array(kinds) == kind for kind in dict.fromkeys(kinds)], axis=1).astype(np.float64)
        depth = np.linspace(-1.0, 1.0, space.num_groups)
        self._depth = np.stack([depth, 1.5 * depth**2 - 0.5], axis=1)  # Legendre polynomials
        num_bits, num_ranks, num_groups = len(space.bit_choices), len(space.rank_choices), space.num_groups
        sizes = (num_bits, num_ranks, self._kinds.shape[1], 2, num_groups, max(num_groups - 1, 0), num_ranks)
        self.block_of_column = np.repeat(np.arange(len(self.BLOCKS)), sizes)
        ends = np.cumsum(sizes)
        self._slices = {name: slice(end - size, end) for name, size, end in zip(self.BLOCKS, sizes, ends, strict=True)}

    @property
    def num_columns(self) -> int:
        """Of all blocks together."""
        return len(self.block_of_column)

    def columns(self, block: str) -> slice:
        """Which columns a block has."""
        return self._slices[block]

    def transform_positions(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Columns of candidates ``[num_candidates, num_groups, 2]``: ``[num_candidates, num_columns]``, nats.

        The block ``demand`` has shares in [0, 1] instead.
        """
        space, bits, ranks = self.problem.space, positions[..., 0], positions[..., 1]
        losses = self._losses[np.arange(space.num_groups), bits, ranks]
        roots = np.sqrt(losses)
        by_bits = [np.where(bits == rung, losses, 0.0).sum(axis=1) for rung in range(len(space.bit_choices))]
        at_rank = [ranks == rung for rung in range(len(space.rank_choices))]
        by_ranks = [np.where(mask, losses, 0.0).sum(axis=1) for mask in at_rank]
        shares = [mask.mean(axis=1) for mask in at_rank]
        return np.concatenate(
            [
                np.stack([*by_bits, *by_ranks], axis=1),
                losses @ self._kinds,
                losses @ self._depth,
                losses,
                roots[:, :-1] * roots[:, 1:],
                np.stack(shares, axis=1),
            ],
            axis=1,
        )

    def corrected_table(self, weights: npt.NDArray[np.float64], scale: float, unit: float) -> npt.NDArray[np.float64]:
        """The loss table that a linear model of the columns stands for, without what neighbours do to each other.

        Args:
            weights: of the columns, ``[num_columns]``, dimensionless.
            scale: factor of the additive estimate.
            unit: nats that a ``demand`` column is worth.

        Returns:
            ``[num_groups, num_bits, num_ranks]``, nats; may fall below zero.
        """
        part = {name: weights[columns] for name, columns in self._slices.items()}
        by_group = self._kinds @ part["kinds"] + self._depth @ part["depth"] + part["groups"]
        factor = scale + part["bits"][None, :, None] + part["ranks"][None, None, :] + by_group[:, None, None]
        demand = part["demand"] * (unit / self.problem.space.num_groups)
        return np.asarray(self._losses * factor + demand[None, None, :])
