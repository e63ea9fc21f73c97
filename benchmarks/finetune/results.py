"""All that was recorded of one configuration."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from benchmarks.finetune.cell_runs import CellRuns, runs_by_cell
from benchmarks.finetune.claims import BASELINE, UNQUANTIZED, Claim, all_claims
from benchmarks.finetune.comparison import Effect, gap_closed, loss_difference, metric_difference
from benchmarks.finetune.config import Config
from benchmarks.finetune.grid import Cell
from benchmarks.finetune.records import Record


@dataclass(frozen=True)
class Results:
    """Records with what follows from them.

    Attributes:
        config: what was to be run.
        records: of this configuration.
    """

    config: Config
    records: tuple[Record, ...]

    @cached_property
    def cells(self) -> dict[Cell, CellRuns]:
        """Those whose learning rates were all tried, in the order of the tables."""
        return runs_by_cell(self.config, self.records)

    @cached_property
    def unfinished(self) -> list[Cell]:
        """Cells with records, but not of all learning rates."""
        known = dict.fromkeys((record.run.task, record.run.method, record.run.budget) for record in self.records)
        return [cell for cell in known if cell not in self.cells]

    @cached_property
    def tasks(self) -> list[str]:
        """Those that the baseline was run on."""
        return [task for task in self.config.tasks if self.runs(task, BASELINE, None) is not None]

    @cached_property
    def methods(self) -> list[tuple[str, str | None]]:
        """Methods and budgets with a completed run, in the order of the tables."""
        return list(dict.fromkeys((method, budget) for (_, method, budget), runs in self.cells.items() if runs.runs))

    @cached_property
    def claims(self) -> list[Claim]:
        """On all tasks."""
        return all_claims(self.config, self.cells, self.tasks)

    def runs(self, task: str, method: str, budget: str | None) -> CellRuns | None:
        """None where none was completed."""
        found = self.cells.get((task, method, budget))
        return found if found is not None and found.runs else None

    def runs_of_all_tasks(self, method: str, budget: str | None) -> list[CellRuns]:
        """Those with a completed run."""
        return [found for task in self.config.tasks if (found := self.runs(task, method, budget))]

    def loss_to_baseline(self, runs: CellRuns) -> Effect | None:
        """Minus that of the baseline; None where that was not run, or where it is the baseline itself."""
        baseline = self._other(runs, BASELINE)
        return loss_difference(runs, baseline) if baseline else None

    def metric_to_baseline(self, runs: CellRuns) -> Effect | None:
        """Likewise, the metric."""
        baseline = self._other(runs, BASELINE)
        return metric_difference(runs, baseline) if baseline else None

    def gap_closed(self, runs: CellRuns) -> Effect | None:
        """Between the baseline and 16-bit LoRA; None where these are missing, and for themselves."""
        lower, upper = self._other(runs, BASELINE), self._other(runs, UNQUANTIZED)
        return gap_closed(runs, lower, upper) if lower and upper else None

    def baseline_seconds(self, task: str) -> float | None:
        """Of one fine-tune of the baseline, median over its runs."""
        return median_of(
            record.train_seconds
            for record in self.records
            if record.run.task == task and record.run.method == BASELINE and record.status == "completed"
        )

    def _other(self, runs: CellRuns, method: str) -> CellRuns | None:
        task, own, _ = runs.cell
        return None if own == method else self.runs(task, method, None)


def median_of(values: Iterable[float]) -> float | None:
    """None of none."""
    found = list(values)
    return statistics.median(found) if found else None
