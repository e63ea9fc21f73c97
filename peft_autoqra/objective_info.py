"""What a search minimizes, as its messages and files name it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


HELD_OUT_LOSS = ObjectiveInfo("held-out loss", greater_is_better=False, unit="nats per token")
