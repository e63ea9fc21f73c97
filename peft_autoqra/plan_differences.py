"""What is different between two plans of one model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from peft_autoqra.errors import PlanMismatchError
from peft_autoqra.plan import BitRankPlan, LayerPlan


@dataclass(frozen=True, kw_only=True)
class ModuleDifference:
    """One module in two plans.

    Attributes:
        name: of the module.
        first: its bits and rank in the first plan.
        second: likewise.
        shape: of its weight, (out_features, in_features); None where neither plan knows it.
    """

    name: str
    first: LayerPlan
    second: LayerPlan
    shape: tuple[int, int] | None

    @property
    def bits(self) -> int:
        """Of the second plan minus those of the first."""
        return self.second.bits - self.first.bits

    @property
    def rank(self) -> int:
        """Of the second plan minus that of the first."""
        return self.second.rank - self.first.rank

    @property
    def is_same(self) -> bool:
        """Whether both plans say the same of it."""
        return self.first == self.second

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the weight in the second plan minus those in the first, without metadata."""
        return None if self.shape is None else self.bits * math.prod(self.shape) // 8

    @property
    def adapter_parameters(self) -> int | None:
        """Parameters of the adapter in the second plan minus those in the first."""
        return None if self.shape is None else self.rank * sum(self.shape)


@dataclass(frozen=True, kw_only=True)
class PlanDifferences:
    """Two plans, module by module.

    Attributes:
        first: one plan.
        second: the other.
        modules: that both plans name, in the first one's order.
    """

    first: BitRankPlan
    second: BitRankPlan
    modules: tuple[ModuleDifference, ...]

    @classmethod
    def of(cls, first: BitRankPlan, second: BitRankPlan) -> PlanDifferences:
        """Compare two plans.

        Raises:
            PlanMismatchError: they are for different models: no module in common, or one of different shapes.
        """
        common = [name for name in first if name in second]
        if not common:
            raise PlanMismatchError(
                f"The plans are for different models: they have no module in common; the first names "
                f"{next(iter(first))!r}, the second {next(iter(second))!r}."
            )
        for name in common:
            shapes = [plan.shapes[name] for plan in (first, second) if name in plan.shapes]
            if len(set(shapes)) > 1:
                raise PlanMismatchError(
                    f"The plans are for different models: the weight of {name!r} is {shapes[0]} in the first and "
                    f"{shapes[1]} in the second."
                )
        shapes_by_name = {**first.shapes, **second.shapes}
        modules = tuple(
            ModuleDifference(name=name, first=first[name], second=second[name], shape=shapes_by_name.get(name))
            for name in common
        )
        return cls(first=first, second=second, modules=modules)

    @property
    def changed(self) -> tuple[ModuleDifference, ...]:
        """Modules that differ: first those whose weights change by most bytes, then by parameters of the adapter.

        Where shapes are unknown, by bits and ranks.
        """

        def size(module: ModuleDifference) -> tuple[int, int]:
            weight, adapter = module.weight_bytes, module.adapter_parameters
            return (
                abs(module.bits if weight is None else weight),
                abs(module.rank if adapter is None else adapter),
            )

        return tuple(sorted((module for module in self.modules if not module.is_same), key=size, reverse=True))

    @property
    def only_first(self) -> tuple[str, ...]:
        """Modules that the first plan alone names."""
        return tuple(name for name in self.first if name not in self.second)

    @property
    def only_second(self) -> tuple[str, ...]:
        """Modules that the second plan alone names."""
        return tuple(name for name in self.second if name not in self.first)

    @property
    def are_same(self) -> bool:
        """Whether both plans build the same model: bits, ranks, quantizer and initialization."""
        return self.first == self.second

    @property
    def other_weights(self) -> bool:
        """Whether the plans were made for models of the same shape with different weights."""
        fingerprints = {plan.base_model.fingerprint for plan in (self.first, self.second)} - {None}
        return len(fingerprints) > 1

    def bits_changes(self) -> dict[tuple[int, int], int]:
        """Bits in the first and in the second plan to the number of modules, those without change included."""
        return dict(sorted(Counter((module.first.bits, module.second.bits) for module in self.modules).items()))

    def rank_changes(self) -> dict[tuple[int, int], int]:
        """Likewise, of ranks."""
        return dict(sorted(Counter((module.first.rank, module.second.rank) for module in self.modules).items()))
