"""Which runs a configuration asks for, in order, given what was recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.finetune.config import Config, Group
from benchmarks.finetune.method import Method
from benchmarks.finetune.records import Record, Run

LEAST_SWEPT = 3
"""Rates of a configuration that are a sweep; fewer are taken as they are."""
MAX_FURTHER_RATES = 2

Cell = tuple[str, str, str | None]
"""Task, method, budget."""


def wanted_runs(config: Config, methods: Mapping[str, Method], records: Sequence[Record]) -> list[Run]:
    """Runs that are not recorded yet and can be started.

    Learning rates are tried with the first seed (:func:`swept_rates`); the best one by the development split is run
    with the others.
    """
    known = {record.run for record in records}
    runs = dict.fromkeys(run for group in config.groups for run in _group_runs(config, group, methods, records))
    return [run for run in runs if run not in known]


def swept_rates(cell: Cell, config: Config, records: Sequence[Record], seed: int) -> tuple[float, ...]:
    """Those of the configuration, and one more, twice as far out, as long as the best one is at the edge.

    The rule is the same for all methods, so that none loses for a grid that was made for another.

    Args:
        cell: task, method, budget.
        config: rates to begin with.
        records: of all runs.
        seed: that rates are tried with.
    """
    losses = _dev_losses(cell, records, seed)
    rates = sorted(config.learning_rates)
    for _ in range(MAX_FURTHER_RATES if len(rates) >= LEAST_SWEPT else 0):
        if not set(rates) <= losses.keys():
            break
        best = min(rates, key=lambda rate: losses[rate])
        if losses[best] == math.inf or best not in (rates[0], rates[-1]):
            break
        rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
    return tuple(rates)


def best_learning_rate(cell: Cell, config: Config, records: Sequence[Record], seed: int) -> float | None:
    """With the least loss on the development split; None while some were not tried, or where all diverged."""
    losses = _dev_losses(cell, records, seed)
    rates = swept_rates(cell, config, records, seed)
    if not set(rates) <= losses.keys():
        return None
    best = min(rates, key=lambda rate: losses[rate])
    return None if losses[best] == math.inf else best


def _dev_losses(cell: Cell, records: Sequence[Record], seed: int) -> dict[float, float]:
    """By learning rate; infinite where a run diverged or could not be made."""
    return {
        record.run.learning_rate: math.inf if record.dev is None else record.dev.loss
        for record in records
        if (record.run.task, record.run.method, record.run.budget) == cell and record.run.seed == seed
    }


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
        for rate in swept_rates(cell, config, records, first):
            yield _run(config, cell, rate, first)
    for seed in others:
        for cell in cells:
            rate = best_learning_rate(cell, config, records, first)
            if rate is not None:
                yield _run(config, cell, rate, seed)


def _run(config: Config, cell: Cell, rate: float, seed: int) -> Run:
    task, method, budget = cell
    return Run(config=config.name, task=task, method=method, budget=budget, learning_rate=rate, seed=seed)
