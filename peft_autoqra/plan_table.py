"""A plan as a Markdown table that stays readable for models of many layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from peft_autoqra.markdown import markdown_table
from peft_autoqra.plan_grid import BitsAndRank, PlanGrid

MAX_COLUMNS = 24
"""Above it, as with a layer for every expert, the table counts modules by type."""

TYPE_HEADER = ("module type", "modules", "bits", "rank")
"""Of the rows of :func:`rows_by_type`."""

_MAX_OPEN_ROWS = 40
Row = TypeVar("Row")


def plan_table(layers: Mapping[str, BitsAndRank]) -> str:
    """Rows are layers, columns module types, cells bits and rank; neighbouring layers that are equal share a row.

    Args:
        layers: module name to bits and rank. Where every rank is 0, cells hold bits alone.
    """
    grid = PlanGrid.from_names(layers)
    with_ranks = any(layer.rank for layer in layers.values())
    cell_format = "bits/rank" if with_ranks else "bits"
    if len(grid.columns) > MAX_COLUMNS:
        return markdown_table(TYPE_HEADER, rows_by_type(layers))
    rows = []
    for row_index in range(len(grid.rows)):
        names = [grid.cells.get((row_index, column)) for column in range(len(grid.columns))]
        rows.append(tuple("" if name is None else _cell(layers[name], with_ranks) for name in names))
    body = [(label, *cells) for label, cells in collapsed_rows(grid, rows)]
    table = markdown_table((f"layer ({cell_format})", *grid.columns), body)
    if len(body) <= _MAX_OPEN_ROWS:
        return table
    return f"<details><summary>{len(body)} rows of {cell_format}</summary>\n\n{table}\n\n</details>"


def _cell(layer: BitsAndRank, with_rank: bool) -> str:
    return f"{layer.bits}/{layer.rank}" if with_rank else str(layer.bits)


def collapsed_rows(grid: PlanGrid, rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Runs of equal layers in one row.

    Args:
        grid: of the modules.
        rows: what is shown of each layer, in the order of the grid's rows.

    Returns:
        Label, such as ``"0-7"``, and row of every run.
    """
    labels = grid.row_labels
    runs: list[list[int]] = []
    for index, cells in enumerate(rows):
        if runs and rows[runs[-1][-1]] == cells and _are_neighbours(grid, runs[-1][-1], index):
            runs[-1].append(index)
        else:
            runs.append([index])
    return [
        (labels[run[0]] if len(run) == 1 else f"{labels[run[0]]}-{grid.rows[run[-1]].number}", rows[run[0]])
        for run in runs
    ]


def _are_neighbours(grid: PlanGrid, first: int, second: int) -> bool:
    one, other = grid.rows[first], grid.rows[second]
    if one.number is None or other.number is None:
        return False
    return one.prefix == other.prefix and other.number == one.number + 1


def rows_by_type(layers: Mapping[str, BitsAndRank]) -> list[tuple[str, str, str, str]]:
    """One row for every type of module: its name with ``*`` for numbers, how many, and the range of bits and ranks."""
    groups: dict[str, list[BitsAndRank]] = {}
    for name, layer in layers.items():
        kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(kind, []).append(layer)
    return [
        (kind, str(len(group)), _range(layer.bits for layer in group), _range(layer.rank for layer in group))
        for kind, group in groups.items()
    ]


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"
