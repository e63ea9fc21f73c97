"""The tables of a report: figures as people read them on the page, exact in the CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_figure import MEMORY_PARTS
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.report_analysis import StageShare
from peft_autoqra.report_data import ComparedPlan, TrialRow
from peft_autoqra.stage_marks import stage_title
from peft_autoqra.units import format_bytes, format_seconds, format_signed


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        title: on the page.
        name: in the CSV file; with the unit.
        values: exact, None where there is none.
        show: makes text of a value for the page.
        is_number: it is aligned to the right.
    """

    title: str
    name: str
    values: Sequence[Any]
    show: Callable[[Any], str] = str
    is_number: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """Some columns of the same length; the first one names the rows.

    Attributes:
        name: of the CSV file.
        caption: what it shows.
        columns: at least one.
    """

    name: str
    caption: str
    columns: Sequence[Column]

    @property
    def shown_rows(self) -> list[list[str]]:
        """As on the page."""
        return [
            ["-" if value is None else column.show(value) for column, value in zip(self.columns, row, strict=True)]
            for row in zip(*(column.values for column in self.columns), strict=True)
        ]

    def to_csv(self) -> str:
        """With a header; values exact, nothing where there is none."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column.name for column in self.columns)
        writer.writerows(zip(*(column.values for column in self.columns), strict=True))
        return file.getvalue()


def text_column(title: str, name: str, values: Sequence[str | None]) -> Column:
    """A column of words."""
    return Column(title=title, name=name, values=values, is_number=False)


def compared_table(compared: Sequence[ComparedPlan], scope: str | None, objective: ObjectiveInfo) -> Table:
    """The winner and the baselines."""
    margins = [plan.margin and objective.figure(plan.margin[0]) for plan in compared]
    bounds = [objective.interval(*plan.margin[1:]) if plan.margin else (None, None) for plan in compared]
    memories = [plan.memory for plan in compared]
    totals = {
        "training": [memory.total_bytes if memory else None for memory in memories],
        "stored": [memory.stored_bytes if memory else None for memory in memories],
    }
    if scope in totals:
        totals[scope] = [plan.total_bytes for plan in compared]
    return Table(
        name="plans",
        caption="The winner and the plans that need no search",
        columns=[
            text_column("plan", "plan", [plan.name for plan in compared]),
            _figures(objective, [plan.loss for plan in compared]),
            *([] if objective == HELD_OUT_LOSS else [_held_out_losses(compared)]),
            _number("seeds", "num_seeds", [plan.num_seeds for plan in compared]),
            _number("winner minus this", "winner_minus_this", margins, format_signed),
            _number("95% from", "interval_low", [low for low, _ in bounds], format_signed),
            _number("to", "interval_high", [high for _, high in bounds], format_signed),
            _number("training", "training_bytes", totals["training"], format_bytes),
            _number("stored", "stored_bytes", totals["stored"], format_bytes),
            _number("bits", "average_bits", [plan.average_bits for plan in compared], "{:.2f}".format),
            _number("rank", "average_rank", [plan.average_rank for plan in compared], "{:.1f}".format),
        ],
    )


def plan_modules_table(plan: BitRankPlan) -> Table:
    """Bits and rank of every module."""
    return Table(
        name="modules",
        caption="Bits and rank of every module",
        columns=[
            text_column("module", "module", list(plan)),
            _number("bits", "bits", [layer.bits for layer in plan.values()]),
            _number("rank", "rank", [layer.rank for layer in plan.values()]),
        ],
    )


def memory_table(columns: Mapping[str, MemoryEstimate]) -> Table:
    """Bytes by part."""
    parts = {**MEMORY_PARTS, "stored_bytes": "stored", "total_bytes": "training"}
    return Table(
        name="memory",
        caption="Bytes by part",
        columns=[
            text_column("bytes", "part", list(parts.values())),
            *(
                _number(name, f"{name}_bytes", [getattr(memory, part) for part in parts], "{:,}".format)
                for name, memory in columns.items()
            ),
        ],
    )


def fidelity_table(trials: Sequence[TrialRow], objective: ObjectiveInfo) -> Table:
    """What was spent on each fidelity."""
    levels = sorted({trial.num_steps for trial in trials})
    groups = [[trial for trial in trials if trial.num_steps == level] for level in levels]
    losses = [[trial.loss for trial in group if trial.loss is not None] for group in groups]
    first = min((trial.seed for trial in trials), default=0)
    of_first = [[t.loss for t in group if t.loss is not None and t.seed == first] for group in groups]
    return Table(
        name="fidelities",
        caption="Fidelities; the best is of the first seed",
        columns=[
            _number("training steps", "training_steps", levels),
            _number("trials", "num_trials", [len(group) for group in groups]),
            _number("failed", "num_failed", [len(g) - len(found) for g, found in zip(groups, losses, strict=True)]),
            _figures(objective, [min(x, default=None) for x in of_first], prefix="best"),
            _number(
                "cost, full fine-tunes", "cost_full_fine_tunes", [_cost(group) for group in groups], "{:.2f}".format
            ),
            _number("time", "seconds", [sum(trial.seconds for trial in group) for group in groups], format_seconds),
        ],
    )


def stage_table(shares: Sequence[StageShare], objective: ObjectiveInfo) -> Table:
    """What each stage took and won."""
    gains = [share.gain for share in shares]
    bounds = [(None, None) if gain is None else (-gain.interval[1], -gain.interval[0]) for gain in gains]
    return Table(
        name="stages",
        caption="Stages; the best is of the last fidelity and the first seed",
        columns=[
            text_column("stage", "stage", [stage_title(share.stage) for share in shares]),
            _number("trials", "num_trials", [share.num_trials for share in shares]),
            _number("failed", "num_failed", [share.num_failed for share in shares]),
            _figures(objective, [share.best_loss for share in shares], prefix="best"),
            _number(
                "won",
                "won_" + objective.column_name.removeprefix("loss_"),
                [gain and -gain.mean for gain in gains],
                format_signed,
            ),
            _number("95% from", "interval_low", [low for low, _ in bounds], format_signed),
            _number("to", "interval_high", [high for _, high in bounds], format_signed),
            _number("cost, full fine-tunes", "cost_full_fine_tunes", [s.cost for s in shares], "{:.2f}".format),
            _number("time", "seconds", [share.seconds for share in shares], format_seconds),
        ],
    )


def surrogate_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """How well candidates would have been promoted."""

    def column(title: str, name: str, show: Callable[[Any], str] = str) -> Column:
        return _number(title, name, [check[name] for check in checks], show)

    return Table(
        name="surrogate",
        caption="Who may climb: the surrogate against the cheap loss alone, each judged in leave-one-out",
        columns=[
            column("results", "num_results"),
            column("rank correlation", "rank_correlation", "{:.2f}".format),
            column("of the cheap loss", "cheap_rank_correlation", "{:.2f}".format),
            column("hit rate", "hit_rate", "{:.0%}".format),
            column("of the cheap loss", "cheap_hit_rate", "{:.0%}".format),
            column("of the best", "top_k"),
            column("used", "is_used", lambda is_used: "yes" if is_used else "no"),
        ],
    )


def trial_table(trials: Sequence[TrialRow], objective: ObjectiveInfo) -> Table:
    """Every trial."""
    return Table(
        name="trials",
        caption="Every trial in the order in which they were done",
        columns=[
            _number("trial", "trial", [trial.number for trial in trials]),
            text_column("found by", "found_by", [stage_title(trial.origin) for trial in trials]),
            _number("steps", "training_steps", [trial.num_steps for trial in trials]),
            _number("seed", "seed", [trial.seed for trial in trials]),
            _number(
                "learning rate factor", "learning_rate_factor", [t.learning_rate_factor for t in trials], "{:g}".format
            ),
            _figures(objective, [trial.loss for trial in trials]),
            _number("memory", "total_bytes", [trial.total_bytes for trial in trials], format_bytes),
            _number("cost", "cost_full_fine_tunes", [trial.cost for trial in trials], "{:.3f}".format),
            _number("took", "seconds", [trial.seconds for trial in trials], format_seconds),
            _number("done after", "end_seconds", [trial.end_seconds for trial in trials], format_seconds),
            text_column("error", "error", [trial.error for trial in trials]),
        ],
    )


def _cost(trials: Sequence[TrialRow]) -> float:
    return sum(trial.cost for trial in trials)


def _held_out_losses(compared: Sequence[ComparedPlan]) -> Column:
    losses = [plan.held_out_loss for plan in compared]
    return _number(HELD_OUT_LOSS.title, HELD_OUT_LOSS.column_name, losses, "{:.4f}".format)


def _figures(objective: ObjectiveInfo, losses: Sequence[float | None], *, prefix: str = "") -> Column:
    """What losses are of."""
    values = [None if loss is None else objective.figure(loss) for loss in losses]
    title, name = f"{prefix} {objective.short_name}".strip(), f"{prefix}_{objective.column_name}".strip("_")
    return _number(title, name, values, "{:.4f}".format)


def _number(title: str, name: str, values: Sequence[Any], show: Callable[[Any], str] = str) -> Column:
    return Column(title=title, name=name, values=values, show=show)
