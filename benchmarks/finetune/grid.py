"""Which runs a configuration asks for, in order, given what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.finetune.config import Config, Group
from benchmarks.finetune.method import Method
from benchmarks.finetune.records import Record, Run

Cell = tuple[str, str, str | None]
"""Task, method, budget."""


def wanted_runs(config: Config, methods: Mapping[str, Method], records: Sequence[Record]) -> list[Run]:
    """Runs that are not recorded yet and can be started.

    Learning rates are tried with the first seed; the best one by the development split is run with the others.
    """
    known = {record.run for record in records}
    runs = dict.fromkeys(run for group in config.groups for run in _group_runs(config, group, methods, records))
    return [run for run in runs if run not in known]


def best_learning_rate(cell: Cell, config: Config, records: Sequence[Record], seed: int) -> float | None:
    """With the least loss on the development split; None while some were not tried, or where all diverged."""
    of_cell = {
        record.run.learning_rate: record
        for record in records
        if (record.run.task, record.run.method, record.run.budget) == cell and record.run.seed == seed
    }
    if not set(config.learning_rates) <= of_cell.keys():
        return None
    losses = {rate: record.dev.loss for rate, record in of_cell.items() if record.dev is not None}
    return min(losses, key=lambda rate: losses[rate], default=None)


def group_cells(config: Config, group: Group, methods: Mapping[str, Method]) -> Iterator[Cell]:
    """Of a group; methods that fit themselves into no budget have one cell a task."""
    for name in group.methods:
        budgets: tuple[str | None, ...] = group.budgets if methods[name].needs_budget else (None,)
        for budget in budgets:
            for task in group.tasks or config.tasks:
                yield task, name, budget


def _group_runs(
    config: Config, group: Group, methods: Mapping[str, Method], records: Sequence[Record]
) -> Iterator[Run]:
    cells = list(group_cells(config, group, methods))
    first, *others = group.seeds
    for cell in cells:
        for rate in config.learning_rates:
            yield _run(config, cell, rate, first)
    for seed in others:
        for cell in cells:
            rate = best_learning_rate(cell, config, records, first)
            if rate is not None:
                yield _run(config, cell, rate, seed)


def _run(config: Config, cell: Cell, rate: float, seed: int) -> Run:
    task, method, budget = cell
    return Run(config=config.name, task=task, method=method, budget=budget, learning_rate=rate, seed=seed)
