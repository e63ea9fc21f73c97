"""A plan as a picture: layers down, module types across, colour is bits, the area of the dot is rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from peft_autoqra import colours
from peft_autoqra.drawing import NORMAL, Drawing, plot_settings
from peft_autoqra.plan_grid import BitsAndRank, PlanGrid

PICTURE_FILE = "autoqra_plan.png"

_MAX_ROWS, _MAX_COLUMNS = 256, 40
_MAX_SHOWN_RANKS = 6

_DOTS_PER_INCH = 100  # lengths below are whole pixels then, which compresses better
_MARGIN, _KEY_HEIGHT, _MIN_WIDTH = 0.12, 0.26, 4.2  # inches, as all lengths here
_CHARACTER_WIDTH = 0.074
_COLUMN_WIDTH, _UPRIGHT_CHARACTERS, _LEANING = 0.62, 9, 40  # degrees of labels that are wider than a column


class _Cell(NamedTuple):
    """A module; hashable, so that pictures can be remembered."""

    name: str
    bits: int
    rank: int


def draw_plan(layers: Mapping[str, BitsAndRank]) -> bytes | None:
    """A PNG of a plan; None where it would not be legible.

    Args:
        layers: module name to bits and rank.
    """
    return _draw(tuple(_Cell(name, layer.bits, layer.rank) for name, layer in layers.items()))


@lru_cache(maxsize=4)
def _draw(cells: tuple[_Cell, ...]) -> bytes | None:
    with plot_settings():
        drawing = _drawing(cells)
        return None if drawing is None else drawing.to_png(_DOTS_PER_INCH)


def plan_drawing(layers: Mapping[str, BitsAndRank]) -> Drawing | None:
    """A plan as a figure, inside of ``with plot_settings():``; None where it would not be legible.

    Args:
        layers: module name to bits and rank.
    """
    return _drawing([_Cell(name, layer.bits, layer.rank) for name, layer in layers.items()])


def _drawing(cells: Sequence[_Cell]) -> Drawing | None:
    grid = PlanGrid.from_names(cell.name for cell in cells)
    if len(grid.rows) > _MAX_ROWS or len(grid.columns) > _MAX_COLUMNS:
        return None
    layout = _Layout(grid)
    modules = {cell.name: cell for cell in cells}
    max_rank = max(cell.rank for cell in cells)
    sheet = _Sheet()
    for (row, column), name in grid.cells.items():
        cell, (x, y) = modules[name], layout.corner(row, column)
        hint = f"{name}: {cell.bits} bits, " + (f"rank {cell.rank}" if cell.rank else "no adapter")
        sheet.square(x, y, layout.column_width, layout.row_height, cell.bits, hint)
        sheet.dot(x + layout.column_width / 2, y + layout.row_height / 2, cell.rank, max_rank, layout.radius, hint)
    for row, label in enumerate(grid.row_labels):
        y = layout.corner(row, 0)[1] + layout.row_height / 2
        sheet.write(layout.left - 0.07, y, _row_title(label), ha="right", va="center_baseline")
    leaning = {"rotation": _LEANING, "rotation_mode": "anchor", "ha": "left"} if layout.leans else {"ha": "center"}
    for column, label in enumerate(grid.columns):
        x = layout.corner(0, column)[0] + layout.column_width / 2
        sheet.write(x, layout.top - 0.06, label, va="baseline", **leaning)
    height = _add_legend(sheet, cells, layout)
    return sheet.draw(layout.width, height, f"Bits and rank of {len(cells)} modules, layers down, module types across")


def _row_title(label: str) -> str:
    return f"layer {label}" if label.isdecimal() else label


class _Square(NamedTuple):
    """A cell, or a sample of a colour; inches."""

    x: float
    y: float
    width: float
    height: float
    bits: int
    hint: str


class _Dot(NamedTuple):
    """An adapter; inches."""

    x: float
    y: float
    radius: float
    hint: str


class _Layout:
    """Where things are, in inches from the upper left corner."""

    def __init__(self, grid: PlanGrid) -> None:
        longest_row = max(len(_row_title(label)) for label in grid.row_labels)
        longest_column = max(len(label) for label in grid.columns)
        self.leans = longest_column > _UPRIGHT_CHARACTERS
        self.column_width = _COLUMN_WIDTH
        self.row_height = 0.22 if len(grid.rows) <= 48 else 0.16
        self.radius = self.row_height * 0.4
        reach = longest_column * _CHARACTER_WIDTH if self.leans else 0.0
        self.left = round(_MARGIN + longest_row * _CHARACTER_WIDTH + 0.1, 2)
        self.top = round(_MARGIN + 0.2 + reach * math.sin(math.radians(_LEANING)), 2)
        self.bottom = self.top + len(grid.rows) * self.row_height
        # the last label leans out of the grid
        overhang = max(len(grid.columns[-1]) * _CHARACTER_WIDTH * math.cos(math.radians(_LEANING)) - 0.3, 0.0)
        right = self.left + len(grid.columns) * self.column_width + (overhang if self.leans else 0.0) + _MARGIN
        self.width = max(right, _MIN_WIDTH)

    def corner(self, row: int, column: int) -> tuple[float, float]:
        return self.left + column * self.column_width, self.top + row * self.row_height


@dataclass
class _Sheet:
    """Collects what is drawn; y grows downwards."""

    squares: list[_Square] = field(default_factory=list)
    dots: list[_Dot] = field(default_factory=list)
    texts: list[tuple[float, float, str, dict[str, Any]]] = field(default_factory=list)

    def square(self, x: float, y: float, width: float, height: float, bits: int, hint: str = "") -> None:
        self.squares.append(_Square(x + 0.01, y + 0.01, width - 0.02, height - 0.02, bits, hint))

    def dot(self, x: float, y: float, rank: int, max_rank: int, largest_radius: float, hint: str = "") -> None:
        if rank:
            self.dots.append(_Dot(x, y, max(largest_radius * math.sqrt(rank / max_rank), 0.018), hint))

    def write(self, x: float, y: float, text: str, **properties: Any) -> None:
        printable = "".join(character if character.isprintable() else " " for character in text)
        drawable = printable.encode("latin-1", "backslashreplace").decode("latin-1")  # the font knows few others
        self.texts.append((x, y, drawable, properties))

    def draw(self, width: float, height: float, title: str) -> Drawing:
        from matplotlib.collections import PatchCollection  # noqa: PLC0415
        from matplotlib.patches import Circle, Rectangle  # noqa: PLC0415

        drawing = Drawing(width, height, title)
        axes = drawing.sheet()
        rectangles = PatchCollection(
            [Rectangle((square.x, square.y), square.width, square.height) for square in self.squares],
            facecolors=[colours.BITS[square.bits] for square in self.squares],
            edgecolors=colours.CELL_EDGE,
            linewidths=0.4,
        )
        circles = PatchCollection(
            [Circle((dot.x, dot.y), dot.radius) for dot in self.dots],
            facecolors=colours.DOT,
            edgecolors=colours.DOT_EDGE,
            linewidths=0.8,
        )
        for collection, marks in ((rectangles, self.squares), (circles, self.dots)):
            axes.add_collection(collection, autolim=False)
            drawing.hint(collection, *(mark.hint for mark in marks))
        for x, y, text, properties in self.texts:
            axes.text(x, y, text, size=NORMAL, color=colours.INK, **properties)
        return drawing


def _add_legend(sheet: _Sheet, cells: Sequence[_Cell], layout: _Layout) -> float:
    """Which colour is which bit-width and which dot which rank; returns where it ends."""
    bits, ranks = ({getattr(cell, name) for cell in cells} for name in ("bits", "rank"))
    y = layout.bottom + 0.2
    y = _keys(sheet, [(f"{value} bits", value, None) for value in sorted(bits)], y, layout, max(ranks))
    if max(ranks):
        dots: list[tuple[str, int | None, int | None]] = [
            (f"rank {value}", None, value) for value in _thinned(sorted(ranks - {0}))
        ]
        y = _keys(sheet, [*dots, *([("no dot: no adapter", None, None)] if 0 in ranks else [])], y, layout, max(ranks))
    return y + _MARGIN - _KEY_HEIGHT / 4


def _keys(
    sheet: _Sheet, keys: list[tuple[str, int | None, int | None]], y: float, layout: _Layout, max_rank: int
) -> float:
    x = _MARGIN
    for title, bits, rank in keys:
        sample = 0.27 if bits is not None or rank is not None else 0.0
        width = sample + len(title) * _CHARACTER_WIDTH + 0.1
        if x > _MARGIN and x + width > layout.width:
            x, y = _MARGIN, y + _KEY_HEIGHT
        if bits is not None:
            sheet.square(x, y - 0.08, 0.2, 0.16, bits)
        elif rank is not None:
            sheet.dot(x + 0.1, y, rank, max_rank, layout.radius)
        sheet.write(x + sample, y, title, ha="left", va="center_baseline")
        x += width
    return y + _KEY_HEIGHT


def _thinned(ranks: list[int]) -> list[int]:
    if len(ranks) <= _MAX_SHOWN_RANKS:
        return ranks
    step = (len(ranks) - 1) / (_MAX_SHOWN_RANKS - 1)
    return [ranks[round(index * step)] for index in range(_MAX_SHOWN_RANKS)]
