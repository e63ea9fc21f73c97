"""What the search stages know of the world: a space, additive tables over it, and a budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peft_autoqra.errors import UnreachableBudgetError
from peft_autoqra.search_space import Candidate, SearchSpace


@dataclass(frozen=True, eq=False)
class SearchProblem:
    """A search space with its exact memory and its additive loss estimate.

    Attributes:
        space: the choices.
        bytes_table: bytes of a group at (bits, rank), ``[num_groups, num_bits, num_ranks]``, int64; exact.
        loss_table: estimated rise of the loss (nats per token) from a group at (bits, rank), same shape, float64;
            an additive proxy, not the truth. Entries at ranks a group does not allow are ignored.
        fixed_bytes: bytes that no choice changes (embeddings, norms, heads).
        budget_bytes: limit of the total.
    """

    space: SearchSpace
    bytes_table: npt.NDArray[np.int64]
    loss_table: npt.NDArray[np.float64]
    fixed_bytes: int
    budget_bytes: int

    def __post_init__(self) -> None:
        """Check shapes and that the budget can be reached.

        Raises:
            UnreachableBudgetError: even the smallest choice of every group is above the budget.
            ValueError: a table has the wrong shape or values that are not finite.
        """
        shape = (self.space.num_groups, len(self.space.bit_choices), len(self.space.rank_choices))
        for name, table in (("bytes_table", self.bytes_table), ("loss_table", self.loss_table)):
            if table.shape != shape:
                raise ValueError(f"{name} has shape {table.shape}; the search space needs {shape}.")
            if not np.isfinite(table).all():
                raise ValueError(f"{name} holds values that are not finite.")
        if self.smallest_bytes > self.budget_bytes:
            raise UnreachableBudgetError(
                f"A budget of {self.budget_bytes:,} bytes cannot be reached: the smallest plan of this search space "
                f"({self.space.bit_choices[0]} bits, rank {self.space.rank_choices[0]} everywhere) takes "
                f"{self.smallest_bytes:,} bytes. Raise the budget or allow fewer bits or smaller ranks."
            )

    @property
    def smallest_bytes(self) -> int:
        """Total bytes when every group takes its smallest choice."""
        return self.total_bytes(self.smallest_candidate())

    @property
    def smallest_trainable_bytes(self) -> int:
        """Total bytes of :meth:`smallest_trainable_candidate`."""
        return self.total_bytes(self.smallest_trainable_candidate())

    def smallest_trainable_candidate(self) -> Candidate:
        """Of the candidates with an adapter somewhere the one that takes the fewest bytes."""
        smallest = self.smallest_candidate()
        if self.space.rank_choices[0] > 0:
            return smallest
        allowed = self.space.allowed_choices()
        sizes = np.where(allowed, self.bytes_table, np.iinfo(np.int64).max)[:, :, 1:]
        extra = sizes.min(axis=(1, 2)) - self._lookup(self.bytes_table, smallest)
        group = int(extra.argmin())
        bits, rank = np.unravel_index(sizes[group].argmin(), sizes[group].shape)
        return (*smallest[:group], (int(bits), int(rank) + 1), *smallest[group + 1 :])

    def smallest_candidate(self) -> Candidate:
        """Every group at the allowed choice that takes the fewest bytes."""
        allowed = self.space.allowed_choices()
        sizes = np.where(allowed, self.bytes_table, np.iinfo(np.int64).max).reshape(self.space.num_groups, -1)
        return self.space.from_array(np.stack(np.unravel_index(sizes.argmin(axis=1), allowed.shape[1:]), axis=1))

    def _lookup(self, table: npt.NDArray[np.generic], candidate: Candidate) -> npt.NDArray[np.generic]:
        positions = self.space.as_array(candidate)
        return table[np.arange(self.space.num_groups), positions[:, 0], positions[:, 1]]

    def total_bytes(self, candidate: Candidate) -> int:
        """Exact bytes of a candidate, fixed part included."""
        return self.fixed_bytes + int(self._lookup(self.bytes_table, candidate).sum())

    def predicted_loss(self, candidate: Candidate) -> float:
        """Sum of the groups' estimated loss rises, nats per token."""
        return float(self._lookup(self.loss_table, candidate).sum())

    def is_trainable(self, candidate: Candidate) -> bool:
        """Whether the candidate has an adapter somewhere, or the space none to give."""
        return self.space.rank_choices[-1] == 0 or any(self.space.rank_choices[rank] for _, rank in candidate)

    def is_feasible(self, candidate: Candidate) -> bool:
        """Whether the candidate is on the ladders and within the budget."""
        return self.space.contains(candidate) and self.total_bytes(candidate) <= self.budget_bytes
