"""The choices of a search: groups of modules that share bits and rank, and the ladders they choose from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import LayerPlan

Candidate = tuple[tuple[int, int], ...]
"""One choice per group: (position on the bit ladder, position on the rank ladder). Hashable."""


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that share one decision.

    Attributes:
        name: unique name, such as ``"model.layers.0"`` or a single module's name.
        modules: the modules' dotted names.
        max_rank: the smaller side of the smallest weight; larger rank choices are not allowed for the group.
    """

    name: str
    modules: tuple[str, ...]
    max_rank: int

    @property
    def kind(self) -> str:
        """The name without layer numbers: what groups of all layers have in common."""
        return ".".join(part for part in self.name.split(".") if not part.isdigit())


@dataclass(frozen=True)
class SearchSpace:
    """Groups x bit choices x rank choices.

    Attributes:
        groups: at least one, no module twice.
        bit_choices: ascending, unique.
        rank_choices: ascending, unique.
    """

    groups: tuple[ModuleGroup, ...]
    bit_choices: tuple[int, ...]
    rank_choices: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check once; every method relies on it.

        Raises:
            InvalidPlanError: empty or unsorted choices, a module in two groups, or a group that no rank choice fits.
        """
        for name, choices in (("bit_choices", self.bit_choices), ("rank_choices", self.rank_choices)):
            if not choices or list(choices) != sorted(set(choices)):
                raise InvalidPlanError(f"{name}={choices} must be ascending, without repeats and not empty.")
        for bits in self.bit_choices:
            for rank in self.rank_choices:
                LayerPlan(bits, rank)
        if not self.groups:
            raise InvalidPlanError("The search space has no modules; check target_modules.")
        modules = [module for group in self.groups for module in group.modules]
        if len(set(modules)) < len(modules):
            raise InvalidPlanError("A module belongs to two groups of the search space.")
        for group in self.groups:
            if group.max_rank < self.rank_choices[0]:
                raise InvalidPlanError(
                    f"{group.name!r} takes ranks up to {group.max_rank}, below the smallest choice "
                    f"{self.rank_choices[0]}; add 0 to rank_choices."
                )

    @property
    def num_groups(self) -> int:
        """Number of decisions."""
        return len(self.groups)

    def num_ranks(self, group_index: int) -> int:
        """How many of the rank choices the group allows (a prefix of the ladder)."""
        return sum(rank <= self.groups[group_index].max_rank for rank in self.rank_choices)

    @cached_property
    def rank_counts(self) -> npt.NDArray[np.int64]:
        """:meth:`num_ranks` of every group, ``[num_groups]``."""
        return np.array([self.num_ranks(index) for index in range(self.num_groups)])

    @cached_property
    def num_rungs(self) -> npt.NDArray[np.int64]:
        """Lengths of every group's bit and rank ladder, ``[num_groups, 2]``."""
        return np.column_stack([np.full_like(self.rank_counts, len(self.bit_choices)), self.rank_counts])

    def allowed_choices(self) -> npt.NDArray[np.bool_]:
        """Which choices each group allows, ``[num_groups, num_bits, num_ranks]``."""
        fits = np.arange(len(self.rank_choices))[None, None, :] < self.rank_counts[:, None, None]
        return np.broadcast_to(fits, (self.num_groups, len(self.bit_choices), len(self.rank_choices)))

    def contains(self, candidate: Candidate) -> bool:
        """Whether every position is on its ladder."""
        return len(candidate) == self.num_groups and all(
            0 <= bit < len(self.bit_choices) and 0 <= rank < self.num_ranks(index)
            for index, (bit, rank) in enumerate(candidate)
        )

    def layer_plan(self, choice: tuple[int, int]) -> LayerPlan:
        """The bits and rank at two ladder positions."""
        return LayerPlan(self.bit_choices[choice[0]], self.rank_choices[choice[1]])

    def _choice(self, layer: LayerPlan) -> tuple[int, int]:
        """Ladder positions of a bits and rank."""
        if layer.bits not in self.bit_choices or layer.rank not in self.rank_choices:
            raise InvalidPlanError(
                f"{layer} is not among the choices of the search space: bits {self.bit_choices}, "
                f"ranks {self.rank_choices}."
            )
        return self.bit_choices.index(layer.bits), self.rank_choices.index(layer.rank)

    def decode(self, candidate: Candidate) -> dict[str, LayerPlan]:
        """Module name to layer plan."""
        return {
            module: self.layer_plan(choice)
            for group, choice in zip(self.groups, candidate, strict=True)
            for module in group.modules
        }

    def encode(self, layers: Mapping[str, LayerPlan]) -> Candidate:
        """The candidate that decodes to these layers.

        Raises:
            InvalidPlanError: a module is missing or not in the space, modules of a group differ, or a value is not
                among the choices of its group.
        """
        foreign = set(layers) - {module for group in self.groups for module in group.modules}
        if foreign:
            raise InvalidPlanError(f"{sorted(foreign)[:3]} are not in the search space.")
        choices = []
        for index, group in enumerate(self.groups):
            values = {layers[module] for module in group.modules if module in layers}
            if len(values) != 1 or any(module not in layers for module in group.modules):
                raise InvalidPlanError(f"The modules of group {group.name!r} need one common bits and rank.")
            choices.append(self._choice(values.pop()))
            if choices[-1][1] >= self.num_ranks(index):
                raise InvalidPlanError(f"{group.name!r} takes ranks up to {group.max_rank}; lower its rank.")
        return tuple(choices)

    def uniform(self, bits: int, rank: int) -> Candidate:
        """The same bits and rank everywhere; rank is lowered to the next choice where a group does not allow it.

        Raises:
            InvalidPlanError: bits or rank are not among the choices.
        """
        bit, wanted = self._choice(LayerPlan(bits, rank))
        return tuple((bit, min(wanted, self.num_ranks(index) - 1)) for index in range(self.num_groups))

    def sample(self, rng: np.random.Generator) -> Candidate:
        """Every position drawn uniformly and independently."""
        return tuple(
            (int(rng.integers(len(self.bit_choices))), int(rng.integers(self.num_ranks(index))))
            for index in range(self.num_groups)
        )

    def neighbors(self, candidate: Candidate) -> Iterator[Candidate]:
        """All atomic edits: one step on one ladder of one group (AutoQRA, Eq. 11)."""
        for index, (bit, rank) in enumerate(candidate):
            for new_bit, new_rank in ((bit - 1, rank), (bit + 1, rank), (bit, rank - 1), (bit, rank + 1)):
                if 0 <= new_bit < len(self.bit_choices) and 0 <= new_rank < self.num_ranks(index):
                    yield (*candidate[:index], (new_bit, new_rank), *candidate[index + 1 :])

    def as_array(self, candidate: Candidate) -> npt.NDArray[np.int64]:
        """Ladder positions, ``[num_groups, 2]`` (bits, rank)."""
        return np.asarray(candidate, dtype=np.int64)

    def from_array(self, positions: npt.NDArray[np.integer]) -> Candidate:
        """The candidate at ladder positions ``[num_groups, 2]``; undoes :meth:`as_array`."""
        return tuple(map(tuple, positions.tolist()))
