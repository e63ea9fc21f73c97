"""Plans that were compared at one fidelity, as points of loss against bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")

WINNER, BEST_SEARCHED = "winner", "best searched"
POINTS = "points"
"""Where a record keeps them."""

_MAX_POINTS, _MAX_CHARACTERS = 500, 80


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """One plan.

    Attributes:
        total_bytes: in the scope of the budget.
        loss: what the search minimized, mean over the seeds that it was trained with.
        difference: mean of its loss minus the winner's over the seeds and sequences that both have.
        interval: 95% interval of that.
        num_seeds: that both were trained with.
        stage: who proposed it first.
        name: ``"winner"``, a baseline's or ``"best searched"``, joined; None for others.
    """

    total_bytes: int
    loss: float
    difference: float
    interval: tuple[float, float]
    num_seeds: int
    stage: str
    name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        known = all(map(math.isfinite, self.interval))
        return asdict(self) | {"interval": list(self.interval) if known else None}


def joined_name(names: Sequence[str]) -> str:
    """Of a plan with several names, such as ``"allocation = uniform (winner)"``."""
    others = " = ".join(name for name in names if name != WINNER)
    return f"{others} ({WINNER})" if others and WINNER in names else others or WINNER


def pareto_front(points: Iterable[PlanPoint]) -> list[PlanPoint]:
    """Those that no other beats in both loss and bytes, smallest first."""
    return front_of(points, lambda point: (point.total_bytes, point.difference))


def front_of(found: Iterable[T], bytes_and_loss: Callable[[T], tuple[float, float]]) -> list[T]:
    """Likewise of anything that has both."""
    front: list[T] = []
    best = math.inf
    for one in sorted(found, key=bytes_and_loss):
        _, loss = bytes_and_loss(one)
        if loss < best:
            front.append(one)
            best = loss
    return front


def points_from(record: Mapping[str, Any]) -> tuple[PlanPoint, ...]:
    """The points that a record keeps; none where there are none, or others than :meth:`PlanPoint.to_dict` makes.

    Args:
        record: JSON, perhaps of a stranger.
    """
    found = record.get(POINTS)
    if not isinstance(found, list) or len(found) > _MAX_POINTS:
        return ()
    points = [_point_from(entry) for entry in found]
    return tuple(point for point in points if point is not None) if all(points) else ()


def budget_from(record: Mapping[str, Any]) -> tuple[int, str] | None:
    """Bytes and what they limit, as a record keeps them; None where it keeps nothing of that kind.

    Args:
        record: JSON, perhaps of a stranger.
    """
    num_bytes, scope = record.get("budget_bytes"), record.get("budget_scope")
    if not isinstance(num_bytes, int) or isinstance(num_bytes, bool) or not 0 < num_bytes < 10**18:
        return None
    return (num_bytes, scope) if scope in ("training", "stored") else None


def _point_from(entry: Any) -> PlanPoint | None:
    """None for anything that cannot be drawn."""
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(PlanPoint)}:
        return None
    numbers = [entry[name] for name in ("total_bytes", "loss", "difference", "num_seeds")]
    interval, name = entry["interval"], entry["name"]
    if not isinstance(interval, list | None) or len(interval or "  ") != 2:
        return None
    if not all(map(_is_finite, [*numbers, *(interval or [])])):
        return None
    if interval and not interval[0] <= entry["difference"] <= interval[1]:
        return None
    if not _is_short(entry["stage"]) or not (name is None or _is_short(name)):
        return None
    return PlanPoint(**{**entry, "interval": tuple(interval or (-math.inf, math.inf))})


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e18  # not NaN either


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_CHARACTERS and value.isascii() and value.isprintable()
