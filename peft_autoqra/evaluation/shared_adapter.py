"""One trained low-rank part that plans of every rank borrow from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.tuner.rank_scaling import alpha_of_rank, row_factor


@dataclass(frozen=True, eq=False)
class SharedAdapter:
    """Trained LoRA factors with nested ranks: the first r components are the adapter of rank r.

    Attributes:
        factors: module name to ``(lora_B [out_features, max_rank], lora_A [max_rank, in_features])``.
        lora_alpha: of the scaling of rank r, :func:`nested_scaling`.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    lora_alpha: int

    def cut(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """``left [out_features, rank]`` and ``right [rank, in_features]`` whose product is added to a module's weight.

        Raises:
            InvalidPlanError: a rank above the largest.
        """
        lora_b, lora_a = self.factors[name]
        if rank > len(lora_a):
            raise InvalidPlanError(
                f"Rank {rank} of {name!r} is above the supernet's {len(lora_a)}; plan a smaller one, or calibrate "
                "higher."
            )
        return lora_b[:, :rank] * nested_scaling(self.lora_alpha, rank), lora_a[:rank]


def nested_scaling(lora_alpha: int, rank: int) -> float:
    """Scaling of the first components together; 0 where there are none.

    An ordinary adapter of this rank has longer or shorter rows of A (:mod:`~peft_autoqra.tuner.rank_scaling`), which
    nested ranks, sharing A, cannot have; so their factor is part of the scaling: ``4 * lora_alpha / rank`` in all.
    """
    return alpha_of_rank(lora_alpha, rank) / math.sqrt(rank) * row_factor(rank) if rank else 0.0
