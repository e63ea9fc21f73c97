"""Plans that were compared at one fidelity, as points of loss against bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """One plan.

    Attributes:
        total_bytes: in the scope of the budget.
        loss: held-out loss, nats per token, mean over the seeds that it was trained with.
        difference: mean of its loss minus the reference's over the seeds and sequences that both have.
        interval: 95% interval of that.
        num_seeds: that both were trained with.
        stage: who proposed it first.
        name: ``"winner"`` or a baseline's; None for others.
    """

    total_bytes: int
    loss: float
    difference: float
    interval: tuple[float, float]
    num_seeds: int
    stage: str
    name: str | None = None


def pareto_front(points: Iterable[PlanPoint]) -> list[PlanPoint]:
    """Those that no other beats in both loss and bytes, smallest first."""
    front: list[PlanPoint] = []
    best = math.inf
    for point in sorted(points, key=lambda point: (point.total_bytes, point.difference)):
        if point.difference < best:
            front.append(point)
            best = point.difference
    return front
