"""``autoqra search``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.parser import RECIPE_FILE
from peft_autoqra.commands.searcher_recipe import read_searcher
from peft_autoqra.commands.tables import memory_data, memory_table, text_table
from peft_autoqra.executors.arguments import ExecutorArguments
from peft_autoqra.executors.make_executor import make_executor
from peft_autoqra.objective_info import HELD_OUT_LOSS
from peft_autoqra.report import write_report
from peft_autoqra.search_estimate import SearchEstimate
from peft_autoqra.search_result import PLAN_FOLDER, ComparedPlan, SearchResult
from peft_autoqra.units import format_bytes, format_seconds


def run(argv: Sequence[str]) -> Outcome:
    """Search, or estimate with ``--dry_run``.

    Raises:
        AutoQRAError: settings, data, model or output directory cannot be used.
    """
    searcher, recipe, options = read_searcher("search", argv)
    if options.dry_run:
        estimate = searcher.estimate()
        return Outcome(estimate_text(estimate), {"dry_run": True, **estimate_data(estimate)})
    workers: ExecutorArguments = recipe.settings[-2]
    result = searcher.run(make_executor(workers), deterministic=workers.deterministic)
    directory = searcher.output_dir
    recipe.save(directory)
    report = write_report(directory)
    text = f"{result_text(result, directory)}\nreport  {report}\nnext    {_next_command(directory)}"
    paths = {"output_dir": str(directory), "plan": str(directory / PLAN_FOLDER), "report": str(report)}
    return Outcome(text, {"dry_run": False, **paths, **result.summary()})


def estimate_data(estimate: SearchEstimate) -> dict[str, Any]:
    """What a dry run gives to programs."""
    figures = asdict(estimate)
    figures["ladder"] = estimate.ladder.to_dict()
    figures["uniform"] = {str(bits): memory_data(memory) for bits, memory in estimate.uniform.items()}
    return figures


def estimate_text(estimate: SearchEstimate) -> str:
    """What a dry run prints."""
    columns = {f"{bits} bits r=16": memory for bits, memory in estimate.uniform.items()}
    fits = [
        title
        for title, memory in columns.items()
        if (memory.total_bytes if estimate.budget_scope == "training" else memory.stored_bytes)
        <= estimate.budget_bytes
    ]
    return "\n".join(
        [
            f"Budget: {format_bytes(estimate.budget_bytes)} ({estimate.budget_bytes:,} bytes, "
            f"{estimate.budget_scope}). Smallest plan: {format_bytes(estimate.smallest_bytes)}.",
            "",
            "Uniform plans (activations are not counted):",
            memory_table(columns),
            f"Within the budget: {', '.join(fits) if fits else 'none of these'}.",
            "",
            spending_text(estimate),
        ]
    )


def spending_text(estimate: SearchEstimate) -> str:
    """How the search will spend what it may cost."""
    ladder, spending = estimate.ladder, estimate.ladder.spending
    rows = [("calibration", "-", "-", f"{ladder.calibration_cost:.3f}")]
    top = len(ladder.fidelities) - 1
    for level, (fidelity, cost) in enumerate(zip(ladder.fidelities, spending.level_costs, strict=True)):
        num = spending.num_at(level)
        steps = f"{fidelity.num_steps} steps" if fidelity.num_steps else "untrained"
        seeds = f", finalists with {spending.num_seeds} seeds" if level == top else ""
        rows.append((f"trials, {steps}{seeds}", f"up to {num}", f"{cost:.4f}", f"up to {num * cost:.3f}"))
    return "\n".join(
        [
            f"The search costs at most {estimate.max_cost:g} full fine-tunes ({estimate.full_steps:,} steps each, "
            f"about {format_seconds(estimate.full_seconds)} here), calibration included:",
            text_table(("part", "number", "cost of one", "cost"), rows),
            f"Trials are scored by {estimate.objective.name} on {ladder.final.num_eval_sequences} held-out "
            "sequences. Together about "
            f"{format_seconds(estimate.max_cost * estimate.full_seconds)}; what one stage leaves, others spend.",
        ]
    )


def result_text(result: SearchResult, directory: Path) -> str:
    """What a finished search prints."""
    rows = [_row("winner", result.winner, result), *(_row(n, t, result) for n, t in result.baselines.items())]
    num_trials = "1 trial" if len(result.trials) == 1 else f"{len(result.trials)} trials"
    num_failed = sum(trial.loss is None for trial in result.trials)
    failed = f" {num_failed} failed; {directory / 'trials.jsonl'} has the reasons." if num_failed else ""
    return "\n".join(
        [
            "",
            f"{num_trials}, {format_seconds(result.seconds)}, cost {result.cost:.2f} of at most "
            f"{result.max_cost:g} full fine-tunes. Budget {format_bytes(result.budget.limit_bytes)} "
            f"({result.budget.scope}).{failed}",
            "",
            text_table(
                ("plan", result.objective.short_name, "seeds", "winner - this", "training", "stored", "bits", "rank"),
                rows,
            ),
            f"{_loss_meaning(result)} after {result.winner.first.fidelity.num_steps} steps, mean over seeds; "
            f"{'above' if result.objective.greater_is_better else 'below'} 0 favours the winner, with its 95% "
            "interval.",
            "",
            result.verdict + _found_by(result.winner.first.origin),
            f"plan    {directory / PLAN_FOLDER}",
        ]
    )


def _found_by(origin: str) -> str:
    """The stage of a searched winner; of a baseline the verdict has said so."""
    return "" if origin.startswith("baseline") else f" It was found by {origin}."


def _loss_meaning(result: SearchResult) -> str:
    if result.objective == HELD_OUT_LOSS:
        return "Loss: held-out, nats per token,"
    better = "more" if result.objective.greater_is_better else "less"
    return f"{result.objective.name}: on held-out examples, {better} is better,"


def _row(name: str, compared: ComparedPlan, result: SearchResult) -> list[str]:
    trial = compared.first
    memory = trial.plan.memory
    scoped = {result.budget.scope: format_bytes(trial.total_bytes)}
    if memory is not None:
        scoped = {"training": format_bytes(memory.total_bytes), "stored": format_bytes(memory.stored_bytes)}
    return [
        name,
        "failed" if compared.loss is None else f"{result.objective.figure(compared.loss):.4f}",
        str(len(compared.trials)),
        _margin(compared, result),
        scoped.get("training", "-"),
        scoped.get("stored", "-"),
        f"{trial.plan.average_bits:.2f}",
        f"{trial.plan.average_rank:.1f}",
    ]


def _margin(compared: ComparedPlan, result: SearchResult) -> str:
    margin = result.winner.minus(compared)
    if margin is None or compared.first == result.winner.first:
        return "-"
    low, high = result.objective.interval(*margin.interval)
    return f"{result.objective.figure(margin.mean):+.4f} [{low:+.4f}, {high:+.4f}]"


def _next_command(directory: Path) -> str:
    parts = ["autoqra", "train", "--config", directory / RECIPE_FILE, "--plan", directory / PLAN_FOLDER]
    return shlex.join(map(str, [*parts, "--output_dir", directory / "adapter"]))
