"""What one row of the conformance table is: something that PEFT users do, and on which models it is not possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.conformance.models import CASES, ModelCase

Check = Callable[[ModelCase, Path], None]
ALL = tuple(case.name for case in CASES)
CAUSAL = tuple(case.name for case in CASES if case.is_causal)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An error that has to come, before the model is touched.

    Attributes:
        error: its type.
        match: regular expression that its message matches.
        reason: for the table.
    """

    error: type[Exception]
    match: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A row.

    Attributes:
        group: heading of its table.
        name: first column.
        check: raises unless the feature works on a model.
        refused: model name to the refusal that is expected of ``check``.
        meaningless: model name to why there is nothing to check.
    """

    group: str
    name: str
    check: Check
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    meaningless: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """For pytest's names."""
        return self.name


class FeatureGroup:
    """Collects features.

    Args:
        name: heading.
    """

    def __init__(self, name: str) -> None:
        """Nothing is in it yet."""
        self.name = name
        self.features: list[Feature] = []

    def feature(
        self,
        name: str,
        *,
        refused: Mapping[str, Refusal] | Refusal | None = None,
        only_for: Sequence[str] = ALL,
        otherwise: str = "",
    ) -> Callable[[Check], Check]:
        """Make a check a row.

        Args:
            name: first column.
            refused: by model, or on every model.
            only_for: models on which it means something.
            otherwise: why it means nothing on the others.
        """
        if isinstance(refused, Refusal):
            refused = dict.fromkeys(only_for, refused)

        def register(check: Check) -> Check:
            meaningless = {model: otherwise for model in ALL if model not in only_for}
            self.features.append(
                Feature(group=self.name, name=name, check=check, refused=refused or {}, meaningless=meaningless)
            )
            return check

        return register
