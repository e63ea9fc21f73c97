"""Pareto fronts over (loss, bytes), both minimized, and the area that they dominate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_autoqra.search_space import Candidate


@dataclass(frozen=True)
class ParetoPoint:
    """An evaluated candidate.

    Attributes:
        candidate: ladder positions.
        loss: nats per token, finite.
        total_bytes: exact memory.
    """

    candidate: Candidate
    loss: float
    total_bytes: int


def nondominated(points: Iterable[ParetoPoint]) -> list[ParetoPoint]:
    """Points that no other is at least as good as in both and better in one; by growing bytes, falling loss.

    Of points with equal loss and bytes the first is kept.
    """
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda point: (point.total_bytes, point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def hypervolume(points: Iterable[ParetoPoint], reference_loss: float, reference_bytes: int) -> float:
    """Area between the front and the reference point, nats times bytes; exact (a sum of rectangles).

    Points that are not better than the reference in both count nothing.
    """
    inside = [point for point in points if point.loss < reference_loss and point.total_bytes < reference_bytes]
    front = nondominated(inside)
    area, end = 0.0, reference_bytes
    for point in reversed(front):
        area += (reference_loss - point.loss) * (end - point.total_bytes)
        end = point.total_bytes
    return area
