"""What a search minimizes, as its messages and files name it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_MAX_CHARACTERS = 80


@dataclass(frozen=True)
class ObjectiveInfo:
    """A figure of a fine-tuned model.

    The loss of a trial is what is minimized: the figure itself, or its negative where greater is better.

    Attributes:
        name: such as ``"accuracy"``.
        greater_is_better: as in ``TrainingArguments``.
        unit: such as ``"nats per token"``; empty for a plain number.
    """

    name: str
    greater_is_better: bool = True
    unit: str = ""

    @property
    def sign(self) -> int:
        """Factor between figure and loss."""
        return -1 if self.greater_is_better else 1

    @property
    def short_name(self) -> str:
        """For columns and titles."""
        return "loss" if self == HELD_OUT_LOSS else self.name

    @property
    def title(self) -> str:
        """With its unit, such as ``"held-out loss, nats per token"``."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def heading(self) -> str:
        """Its name as the first word of a line."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def column_name(self) -> str:
        """For files, such as ``"loss_nats_per_token"``."""
        return re.sub(r"\W+", "_", f"{self.short_name} {self.unit}").strip("_") or "objective"

    def figure(self, loss: float) -> float:
        """What a loss, or a difference of two, is of the figure."""
        return self.sign * loss + 0.0  # no negative zero

    def interval(self, low: float, high: float) -> tuple[float, float]:
        """Likewise of an interval of losses."""
        low, high = sorted((self.figure(low), self.figure(high)))
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


HELD_OUT_LOSS = ObjectiveInfo("held-out loss", greater_is_better=False, unit="nats per token")


def objective_from(record: Mapping[str, Any]) -> ObjectiveInfo:
    """What losses are of, as a record keeps it; the held-out loss where it keeps nothing of that kind.

    Args:
        record: JSON, perhaps of a stranger: names are cut, and hold no characters that figures could not show.
    """
    found = record.get("objective")
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return HELD_OUT_LOSS
    return ObjectiveInfo(
        _shown(found["name"]), bool(found.get("greater_is_better", True)), _shown(str(found.get("unit", "")))
    )


def _shown(text: str) -> str:
    plain = text.encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isprintable() else " " for character in plain)[:_MAX_CHARACTERS]
