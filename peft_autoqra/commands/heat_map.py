"""A plan, or the difference of two, as a grid in the terminal: layers down, module types across."""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group
from rich.text import Text

from peft_autoqra.plan_grid import PlanGrid
from peft_autoqra.plan_table import MAX_COLUMNS, collapsed_rows

Color = Literal["auto", "always", "never"]
_GAP = 1
_LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class HeatCell:
    """What is shown of one module.

    Attributes:
        text: readable without colour.
        style: of rich; empty for none.
    """

    text: str = ""
    style: str = ""


def make_console(color: Color) -> Console:
    """A terminal's width and colours; 80 columns without colour where the output is no terminal.

    Args:
        color: ``"auto"`` follows the terminal, ``NO_COLOR`` and ``FORCE_COLOR``; the others overrule them.
    """
    if color == "auto":
        return Console(highlight=False)
    if color == "never":
        return Console(highlight=False, color_system=None, no_color=True)
    exact = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    system: Literal["truecolor", "256"] = "truecolor" if exact else "256"
    return Console(highlight=False, force_terminal=True, no_color=False, color_system=system)


def render(console: Console, *parts: Text | str) -> str:
    """Lines as that terminal takes them; lines that are too long for it are left for it to wrap.

    Args:
        console: says which colours there are.
        parts: one below the other.
    """
    with console.capture() as capture:
        lines = [part if isinstance(part, Text) else Text(part) for part in parts]
        console.print(Group(*lines), soft_wrap=True, no_wrap=True, crop=False, overflow="ignore")
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def heat_map(module_names: Sequence[str], cell: Callable[[str], HeatCell], width: int) -> Text | None:
    """The grid; neighbouring layers that are equal share a row.

    Where the module types' names are too long they get letters, with a key below; where the columns are too many they
    are shown in several grids, one below the other.

    Args:
        module_names: in the model's order.
        cell: of a module.
        width: columns of the terminal.

    Returns:
        None where there are too many module types, as with a layer for every expert.
    """
    grid = PlanGrid.from_names(module_names)
    if len(grid.columns) > MAX_COLUMNS:
        return None
    columns = range(len(grid.columns))
    cells = {place: cell(name) for place, name in grid.cells.items()}
    rows = [tuple(cells.get((row, column), HeatCell()) for column in columns) for row in range(len(grid.rows))]
    sheet = _Sheet(grid.columns, collapsed_rows(grid, rows))
    return Text("\n").join(sheet.lines(width))


@dataclass(frozen=True)
class _Sheet:
    """Labels and cells, not yet laid out."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, tuple[HeatCell, ...]]]

    def lines(self, width: int) -> Iterator[Text]:
        left = max(len(label) for label in ("layer", *(label for label, _ in self.rows))) + _GAP + 1
        widths = self._column_widths(self.columns)
        names: Mapping[str, str] = {}
        if left + sum(widths) + _GAP * (len(widths) - 1) > width:
            names = dict(zip(_LETTERS, self.columns, strict=False))
            widths = self._column_widths(tuple(names))
        titles = tuple(names) or self.columns
        for number, block in enumerate(_blocks(widths, width - left)):
            if number:
                yield Text("")
            yield Text("layer".ljust(left)) + _header(titles, widths, block)
            for label, cells in self.rows:
                yield Text(label.ljust(left)) + _cells(cells, widths, block)
        for letter, name in names.items():
            yield Text(f"  {letter}  {name}")

    def _column_widths(self, titles: tuple[str, ...]) -> list[int]:
        return [
            max(len(title), *(len(cells[column].text) + 2 for _, cells in self.rows))
            for column, title in enumerate(titles)
        ]


def _blocks(widths: Sequence[int], room: int) -> list[range]:
    """Columns that fit beside each other."""
    starts, used = [0], 0
    for column, width in enumerate(widths):
        used += width + (_GAP if column > starts[-1] else 0)
        if used > room and column > starts[-1]:
            starts.append(column)
            used = width
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(widths)], strict=True)]


def _header(titles: Sequence[str], widths: Sequence[int], block: range) -> Text:
    return Text((" " * _GAP).join(titles[column].center(widths[column]) for column in block))


def _cells(cells: Sequence[HeatCell], widths: Sequence[int], block: range) -> Text:
    return Text(" " * _GAP).join(
        Text(cells[column].text.center(widths[column]), style=cells[column].style) for column in block
    )
