"""Module names as a grid: layers down, module types across."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

OTHER = "other"
"""Label of the row of modules outside of numbered layers."""


class BitsAndRank(Protocol):
    """What a plan says about one module."""

    @property
    def bits(self) -> int:
        """Of a weight."""

    @property
    def rank(self) -> int:
        """Of the adapter; 0 means none."""


@dataclass(frozen=True)
class GridRow:
    """One layer.

    Attributes:
        prefix: dotted name up to the layer's number, such as ``"model.layers"``; empty for modules outside of layers.
        number: of the layer; None for modules outside of layers.
    """

    prefix: str
    number: int | None


@dataclass(frozen=True)
class PlanGrid:
    """Where each module of a model stands.

    Attributes:
        rows: stacks of layers in the order given, layers of a stack by number.
        columns: labels of the module types, in the order given.
        cells: (row, column) to module name.
    """

    rows: tuple[GridRow, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], str]

    @classmethod
    def from_names(cls, module_names: Iterable[str]) -> PlanGrid:
        """Split dotted names at the number of their layer.

        Numbers further inside, as T5 has them (``encoder.block.0.layer.1.DenseReluDense.wi``), are dropped where no
        two modules of a layer fall together then.
        """
        places = {name: _split(name) for name in module_names}
        shorter = {name: (row, _without_numbers(kind)) for name, (row, kind) in places.items()}
        if len(set(shorter.values())) == len(places):
            places = shorter
        stacks = list(dict.fromkeys(row.prefix for row, _ in places.values()))
        rows = sorted({row for row, _ in places.values()}, key=lambda row: (stacks.index(row.prefix), row.number or 0))
        kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        row_index, column_index = ({item: i for i, item in enumerate(items)} for items in (rows, kinds))
        cells = {(row_index[row], column_index[kind]): name for name, (row, kind) in places.items()}
        return cls(tuple(rows), tuple(_shortest_suffixes(kinds)), cells)

    @property
    def row_labels(self) -> tuple[str, ...]:
        """The number of a layer; where there are several stacks, after what tells their names apart."""
        stacks = list(dict.fromkeys(row.prefix for row in self.rows if row.number is not None))
        titles = dict(zip(stacks, _distinct_parts(stacks), strict=True)) if len(stacks) > 1 else {}
        return tuple(
            OTHER if row.number is None else f"{titles.get(row.prefix, '')} {row.number}".strip() for row in self.rows
        )


def _distinct_parts(names: Sequence[str]) -> list[str]:
    """Dotted names without the first and the last parts that all share."""
    split = [name.split(".") for name in names]
    first = _num_shared(split)
    last = _num_shared([parts[first:][::-1] for parts in split])
    return [".".join(parts[first : len(parts) - last]) or parts[-1] for parts in split]


def _num_shared(names: Sequence[Sequence[str]]) -> int:
    """How many first parts all names share."""
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))))


def _split(module_name: str) -> tuple[GridRow, str]:
    match = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", module_name)
    if match is None:
        return GridRow("", None), module_name
    return GridRow(match[1] or "", int(match[2])), match[3]


def _without_numbers(kind: str) -> str:
    return ".".join(part for part in kind.split(".") if not part.isdecimal()) or kind


def _shortest_suffixes(kinds: Sequence[str]) -> list[str]:
    """The fewest last parts of each dotted name that no other name ends with."""
    labels = []
    for kind in kinds:
        parts = kind.split(".")
        suffixes = (".".join(parts[-length:]) for length in range(1, len(parts)))
        unique = (s for s in suffixes if not any(k != kind and f".{k}".endswith(f".{s}") for k in kinds))
        labels.append(next(unique, kind))
    return labels
