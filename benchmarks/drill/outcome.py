"""What became of each attempt to break something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt.

    Attributes:
        case: what was done to what, exactly enough to do it again.
        found: what happened, in a few words that are the same for all like it.
        defect: what was lost or wrong; None where nothing was.
    """

    case: str
    found: str
    defect: str | None = None


@dataclass(frozen=True, kw_only=True)
class PartOutcome:
    """All attempts of one part.

    Attributes:
        name: of the part.
        attempts: in order.
        seconds: that they took.
        figures: what else was measured.
    """

    name: str
    attempts: Sequence[Attempt]
    seconds: float
    figures: dict[str, Any]

    @property
    def num_survived(self) -> int:
        """Attempts after which nothing was lost."""
        return sum(attempt.defect is None for attempt in self.attempts)

    def to_dict(self, seed: int) -> dict[str, Any]:
        """JSON-ready, with every failure."""
        failures = [attempt for attempt in self.attempts if attempt.defect is not None]
        return {
            "num_tried": len(self.attempts),
            "num_survived": self.num_survived,
            "found": dict(sorted(count(self.attempts).items())),
            "seconds": round(self.seconds, 1),
            **self.figures,
            "failures": [{"seed": seed, **vars(attempt)} for attempt in failures],
        }

    def __str__(self) -> str:
        """A line, and one more for each kind of end and each failure."""
        lines = [f"{self.name}: {self.num_survived} of {len(self.attempts)} survived, {self.seconds:.0f} s"]
        lines += [f"    {num:5d}  {found}" for found, num in sorted(count(self.attempts).items())]
        lines += [f"    {key}: {value}" for key, value in self.figures.items()]
        return "\n".join([*lines, *(f"    LOST  {a.case}: {a.defect}" for a in self.attempts if a.defect)])


def count(attempts: Iterable[Attempt]) -> Counter[str]:
    """How often each kind of end was found."""
    return Counter(attempt.found for attempt in attempts)
