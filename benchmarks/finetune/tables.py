"""Tables of docs/finetuning-benchmark.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.finetune.cell_runs import CellRuns
from benchmarks.finetune.claims import BASELINE, MIN_SEEDS, check_memory
from benchmarks.finetune.comparison import (
    loss_difference,
    median_answer_loss,
    median_loss,
    median_metric,
    metric_difference,
)
from benchmarks.finetune.figures import MISSING, interval, megabytes, plain, share, signed, with_interval
from benchmarks.finetune.records import Record
from benchmarks.finetune.results import Results, median_of
from benchmarks.finetune.titles import base_name, budget_title, cell_title, method_title
from peft_autoqra.markdown import markdown_table

_OWN = ("autoqra", "autoqra-gptq", "autoqra-allocation", "autoqra-allocation-gptq")
_OTHERS = ("sequential", "published", "autoround", "uniform", "uniform-zero", "uniform-like", "uniform-like-zero")


def claims_table(results: Results) -> str:
    """Claim by claim and task by task, with n and interval."""
    rows = []
    for claim in results.claims:
        effect = claim.effect
        as_share = claim.figure == "share of the gap"
        value = MISSING if effect is None else share(effect.value) if as_share else signed(effect.value)
        reached = {None: MISSING, True: "yes", False: "no"}[claim.is_reached]
        n = f"{effect.num_seeds} x {effect.num_examples}" if effect else "0"
        bounds = interval(effect, as_share=as_share) if effect else MISSING
        rows.append([claim.text, claim.task, f"{claim.figure}: {value}", bounds, n, reached, claim.verdict])
    header = ["claim", "task", "median over seeds", "95% interval", "n", "by the median", "beyond the interval"]
    return markdown_table(header, rows)


def losses_table(results: Results, task: str) -> str:
    """All cells of a task."""
    rows = []
    for (_, method, budget), runs in results.cells.items():
        if runs.cell[0] == task and runs.runs:
            rows.append([cell_title(method, budget), *_loss_cells(results, runs)])
    header = [
        "method", "learning rate", "loss", f"minus {method_title(BASELINE)}'s", "gap closed", "loss of answers",
        "accuracy", f"minus {method_title(BASELINE)}'s", "mean bits", "mean rank", "seeds", "diverged",
    ]  # fmt: skip
    return markdown_table(header, rows)


def _loss_cells(results: Results, runs: CellRuns) -> list[str]:
    first = runs.records[0]
    return [
        f"{runs.learning_rate:g}",
        plain(median_loss(runs)),
        with_interval(results.loss_to_baseline(runs)),
        with_interval(results.gap_closed(runs), as_share=True),
        plain(median_answer_loss(runs)),
        plain(median_metric(runs)),
        with_interval(results.metric_to_baseline(runs)),
        plain(first.mean_bits, 2),
        plain(first.mean_rank, 1),
        str(len(runs.runs)),
        str(runs.num_diverged),
    ]


def rivals_table(results: Results) -> str:
    """Ours against others within the same memory; empty where no such pair was run."""
    rows = [row for task in results.tasks for row in _rival_rows(results, task)]
    header = ["task", "memory", "first", "second", "loss, first minus second", "accuracy, first minus second", "seeds"]
    return markdown_table(header, rows) if rows else ""


def _rival_rows(results: Results, task: str) -> Iterator[list[str]]:
    ours, rivals = (
        [
            runs
            for base in known
            for (name, method, _), runs in results.cells.items()
            if name == task and base_name(method) == base and runs.runs
        ]
        for known in (_OWN, _OTHERS)
    )
    for index, first in enumerate(ours):
        for second in (*rivals, *ours[index + 1 :]):
            budget = first.cell[2]
            effect = loss_difference(first, second) if second.cell[2] == budget else None
            if effect and budget:
                yield [
                    task,
                    budget_title(budget),
                    method_title(first.cell[1]),
                    method_title(second.cell[1]),
                    with_interval(effect),
                    with_interval(metric_difference(first, second)),
                    str(effect.num_seeds),
                ]


def memory_table(results: Results) -> str:
    """Bytes by part; tasks with the same bytes share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for (task, method, budget), runs in results.cells.items():
        if runs.runs and (memory := runs.records[0].memory):
            parts, limit = memory.measured, memory.budget_bytes
            figures = (
                cell_title(method, budget),
                megabytes(parts.weight_bytes),
                megabytes(parts.metadata_bytes),
                megabytes(parts.untouched_bytes),
                megabytes(parts.adapter_bytes),
                megabytes(parts.gradient_bytes + parts.optimizer_bytes),
                megabytes(parts.total_bytes),
                megabytes(memory.predicted.total_bytes),
                megabytes(parts.stored_bytes),
                megabytes(limit),
                megabytes(memory.peak_bytes),
            )
            rows.setdefault(figures, []).append(task)
    header = [
        "method", "tasks", "weights", "scales", "untouched", "adapter", "gradients + optimizer", "training",
        "training, predicted", "stored", "budget", "peak of the device",
    ]  # fmt: skip
    return markdown_table(header, [[figures[0], ", ".join(tasks), *figures[1:]] for figures, tasks in rows.items()])


def honesty_table(results: Results) -> str:
    """Predicted against measured bytes, over all completed runs of a method."""
    rows = []
    for method in dict.fromkeys(method for method, _ in results.methods):
        check = check_memory(record for record in results.records if record.run.method == method)
        difference = f"{check.largest_difference:+,} ({check.part})" if check.part else "0"
        kept = f"{check.num_kept} of {check.num_limited}" if check.num_limited else "no budget"
        exact = f"{check.num_exact} of {check.num_runs}"
        rows.append([method_title(method), exact, difference.replace("-", "\N{MINUS SIGN}"), kept])
    return markdown_table(["method", "as predicted", "largest difference of a part, bytes", "within budget"], rows)


def cost_table(results: Results) -> str:
    """Before and while training; medians over tasks and seeds."""
    rows = []
    for method, budget in results.methods:
        records = [record for runs in results.runs_of_all_tasks(method, budget) for record in runs.records]
        rows.append(
            [
                cell_title(method, budget),
                plain(median_of(record.spent.seconds for record in records), 0),
                plain(median_of(record.spent.trials for record in records), 0),
                plain(median_of(record.spent.cost for record in records), 2),
                plain(before_training(results, records), 2),
                plain(median_of(record.train_seconds for record in records), 0),
                plain(_in_fine_tunes(results, records, [record.train_seconds for record in records]), 2),
            ]
        )
    header = [
        "method", "before training, s", "trials", "their cost, fine-tunes by tokens",
        "before training, QLoRA fine-tunes", "training, s", "training, QLoRA fine-tunes",
    ]  # fmt: skip
    return markdown_table(header, rows)


def before_training(results: Results, records: Sequence[Record]) -> float | None:
    """Time of search and calibration in units of one fine-tune of the baseline on the same task; a median."""
    return _in_fine_tunes(results, records, [record.spent.seconds for record in records])


def _in_fine_tunes(results: Results, records: Sequence[Record], seconds: Sequence[float]) -> float | None:
    units = [results.baseline_seconds(record.run.task) for record in records]
    return median_of(value / unit for value, unit in zip(seconds, units, strict=True) if unit)


def rates_table(results: Results) -> str:
    """Loss on the development split by learning rate, first seed."""
    rates = sorted({rate for runs in results.cells.values() for rate in runs.swept})
    rows = []
    for (task, method, budget), runs in results.cells.items():
        losses = [_dev_loss(runs.swept.get(rate)) for rate in rates]
        best = MISSING if runs.learning_rate is None else f"{runs.learning_rate:g}"
        rows.append([cell_title(method, budget), task, *losses, best])
    return markdown_table(["method", "task", *(f"{rate:g}" for rate in rates), "best"], rows)


def rates_at_the_edge(results: Results) -> tuple[int, int]:
    """Cells whose best learning rate is the smallest or largest that was tried, and all."""
    found = [runs for runs in results.cells.values() if runs.learning_rate is not None]
    return sum(runs.learning_rate in (min(runs.swept), max(runs.swept)) for runs in found), len(found)


def _dev_loss(record: Record | None) -> str:
    if record is None:
        return MISSING
    return record.status if record.dev is None else plain(record.dev.loss)


def missing_notes(results: Results) -> list[str]:
    """What is not in the tables, and why."""
    notes = [
        f"{cell_title(method, budget)} on {task}: {next(iter(runs.swept.values())).reason or 'all runs diverged'}"
        for (task, method, budget), runs in results.cells.items()
        if not runs.runs
    ]
    notes += [
        f"{cell_title(method, budget)} on {task}: diverged at its best learning rate with seed "
        f"{', '.join(map(str, runs.lost_seeds))}, so that its medians are of fewer seeds, and nothing is shown by it"
        for (task, method, budget), runs in results.cells.items()
        if runs.lost_seeds
    ]
    if results.unfinished:
        names = "; ".join(f"{cell_title(method, budget)} on {task}" for task, method, budget in results.unfinished)
        notes.append(f"Not all learning rates tried yet: {names}")
    few = [cell for cell, runs in results.cells.items() if 0 < len(runs.runs) < MIN_SEEDS]
    if few:
        notes.append(f"One seed only, so that nothing is known about others: {len(few)} of {len(results.cells)} cells")
    return notes


def memory_sentence(results: Results) -> str:
    """Over all methods."""
    check = check_memory(results.records)
    kept = f"; {check.num_kept} of {check.num_limited} with a budget kept it" if check.num_limited else ""
    return f"{check.num_exact} of {check.num_runs} runs had the bytes that were predicted, part by part{kept}."
