"""The runs that stand for a cell: those at its best learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.finetune.config import Config
from benchmarks.finetune.grid import Cell, best_learning_rate, swept_rates
from benchmarks.finetune.records import Record
from benchmarks.finetune.titles import budget_order, method_order


@dataclass(frozen=True, kw_only=True)
class CellRuns:
    """One method on one task at one budget, after its learning rates were tried.

    Attributes:
        cell: task, method, budget.
        learning_rate: best on the development split of the first seed; None where no run was completed.
        runs: by seed, completed at that learning rate.
        swept: by learning rate, of the first seed.
        num_diverged: runs of any learning rate and seed.
        lost_seeds: those that diverged at that learning rate, where the first one did not.
    """

    cell: Cell
    learning_rate: float | None
    runs: Mapping[int, Record]
    swept: Mapping[float, Record]
    num_diverged: int
    lost_seeds: tuple[int, ...] = ()

    @property
    def records(self) -> list[Record]:
        """Completed at the best learning rate, by seed."""
        return [self.runs[seed] for seed in sorted(self.runs)]


class MixedSettings(ValueError):
    """Records that cannot be compared; the message names them."""


def runs_by_cell(config: Config, records: Iterable[Record]) -> dict[Cell, CellRuns]:
    """Cells whose learning rates were all tried, in the order of the tables.

    Args:
        config: its learning rates and seeds.
        records: of any configurations.

    Raises:
        MixedSettings: records of a task were made with different settings under one name.
    """
    ours = list({record.run: record for record in records if record.run.config == config.name}.values())
    _check_settings(ours)
    cells: dict[Cell, list[Record]] = {}
    for record in ours:
        cells.setdefault((record.run.task, record.run.method, record.run.budget), []).append(record)
    ordered = sorted(cells, key=lambda cell: (method_order(cell[1]), budget_order(cell[2]), _task(config, cell)))
    found = {cell: _cell_runs(config, cell, cells[cell]) for cell in ordered}
    return {cell: runs for cell, runs in found.items() if runs is not None}


def _cell_runs(config: Config, cell: Cell, records: Sequence[Record]) -> CellRuns | None:
    """None while learning rates are left to be tried."""
    seed = _first_seed(config, cell)
    swept = {record.run.learning_rate: record for record in records if record.run.seed == seed}
    if not set(swept_rates(cell, config, records, seed)) <= swept.keys():
        return None
    rate = best_learning_rate(cell, config, records, seed)
    return CellRuns(
        cell=cell,
        learning_rate=rate,
        runs={
            record.run.seed: record
            for record in records
            if record.status == "completed" and record.run.learning_rate == rate
        },
        swept=swept,
        num_diverged=sum(record.status == "diverged" for record in records),
        lost_seeds=tuple(
            sorted(
                record.run.seed
                for record in records
                if record.status == "diverged" and record.run.learning_rate == rate
            )
        ),
    )


def _first_seed(config: Config, cell: Cell) -> int:
    """By which the learning rate is chosen."""
    named = [group for group in config.groups if cell[1] in group.methods]
    return (named or config.groups)[0].seeds[0]


def _task(config: Config, cell: Cell) -> int:
    return config.tasks.index(cell[0]) if cell[0] in config.tasks else len(config.tasks)


def _check_settings(records: Sequence[Record]) -> None:
    first: dict[str, Record] = {}
    for record in records:
        known = first.setdefault(record.run.task, record)
        if known.digest != record.digest:
            raise MixedSettings(
                f"{known.run} and {record.run} were run with different recipes or data (digests {known.digest} and "
                f"{record.digest}) under one name; name the changed configuration anew, or delete one of them."
            )
