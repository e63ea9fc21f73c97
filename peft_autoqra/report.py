"""One self-contained HTML page about a search."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from peft_autoqra import report_figures as figures
from peft_autoqra.report_data import ComparedPlan, ReportData, TrialRow, read_report_data
from peft_autoqra.report_style import STYLE
from peft_autoqra.units import format_bytes, format_seconds

REPORT_FILE = "report.html"


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the page about a search (finished or under way) or a plan's folder.

    Args:
        directory: ``output_dir`` of the search.
        output: the file; ``report.html`` in that directory by default.

    Returns:
        The file's path.

    Raises:
        SearchStateError: there is nothing to report on.
        InvalidPlanError: the plan is damaged.
    """
    directory = Path(directory)
    path = Path(output) if output else directory / REPORT_FILE
    page = render_report(read_report_data(directory))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def render_report(data: ReportData) -> str:
    """The page; it loads nothing from elsewhere."""
    sections = [_heading(data), _comparison(data), _plan(data), _memory(data), _trials(data), _reproduction(data)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(_title(data))}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _title(data: ReportData) -> str:
    base = data.plan.base_model.name_or_path if data.plan else None
    return f"AutoQRA: {Path(base).name if base else data.directory.resolve().name}"


def _heading(data: ReportData) -> str:
    facts = []
    if data.budget_bytes is not None:
        facts.append(("budget", f"{format_bytes(data.budget_bytes)} ({data.budget_scope})"))
    if data.trials:
        failed = sum(trial.loss is None for trial in data.trials)
        facts.append(("trials", f"{len(data.trials)}" + (f", {failed} failed" if failed else "")))
    if data.seconds is not None:
        facts.append(("search time", format_seconds(data.seconds)))
    if data.cost is not None:
        facts.append(("cost, in full fine-tunes", f"{data.cost[0]:.2f} of {data.cost[1]:g}"))
    if data.plan is not None:
        facts.append(("average bits", f"{data.plan.average_bits:.2f}"))
        facts.append(("average rank", f"{data.plan.average_rank:.1f}"))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    unfinished = data.trials and not data.compared
    note = "<p>This search has no result yet; the page shows what is there so far.</p>" if unfinished else ""
    return f"<h1>{escape(_title(data))}</h1>{note}<dl class='facts'>{tiles}</dl>"


def _comparison(data: ReportData) -> str:
    if not data.compared:
        return ""
    header = ("plan", "found by", "held-out loss", "seeds", "winner - this", "training", "stored", "bits", "rank")
    rows = [_comparison_row(plan, data.budget_scope) for plan in data.compared]
    steps = data.compared[0].num_steps
    return (
        f"<section><h2>Winner and baselines</h2><p>{escape(data.verdict or '')}</p>"
        + _table(header, rows, num_text_columns=2)
        + f"<p class='note'>Loss in nats per token on the same held-out sequences after {steps} steps, mean over "
        "the seeds. Winner - this: mean and 95% interval over sequences and seeds; below 0 favours the winner. The "
        "winner was chosen on these sequences, so report final figures on others.</p></section>"
    )


def _comparison_row(plan: ComparedPlan, scope: str | None) -> list[str]:
    scoped = {scope: format_bytes(plan.total_bytes)}
    if plan.memory is not None:
        scoped = {
            "training": format_bytes(plan.memory.total_bytes),
            "stored": format_bytes(plan.memory.stored_bytes),
        }
    return [
        plan.name,
        plan.origin,
        "failed" if plan.loss is None else f"{plan.loss:.4f}",
        str(plan.num_seeds),
        f"{plan.margin[0]:+.4f} [{plan.margin[1]:+.4f}, {plan.margin[2]:+.4f}]" if plan.margin else "-",
        scoped.get("training", "-"),
        scoped.get("stored", "-"),
        f"{plan.average_bits:.2f}",
        f"{plan.average_rank:.1f}",
    ]


def _plan(data: ReportData) -> str:
    if data.plan is None:
        return ""
    return (
        "<section><h2>Plan</h2><p class='note'>Colour is bits, the dot's area is rank; no dot means no adapter. Point "
        "at a cell for its module.</p>"
        f"{figures.heat_map_legend(data.plan)}<div class='scroll'>{figures.plan_heat_map(data.plan)}</div></section>"
    )


def _memory(data: ReportData) -> str:
    columns = {plan.name: plan.memory for plan in data.compared if plan.memory is not None}
    if not columns and data.plan is not None and data.plan.memory is not None:
        columns = {"plan": data.plan.memory}
    if not columns:
        return ""
    budget = (data.budget_bytes, data.budget_scope or "") if data.budget_bytes is not None else None
    rows = [
        [title, *(f"{getattr(memory, part):,}" for memory in columns.values())]
        for part, title in figures.MEMORY_PARTS.items()
    ]
    rows.append(["stored", *(f"{memory.stored_bytes:,}" for memory in columns.values())])
    rows.append(["training", *(f"{memory.total_bytes:,}" for memory in columns.values())])
    return (
        "<section><h2>Memory by part</h2><p class='note'>Bytes while training; activations are not counted. Stored: "
        "weights, metadata, untouched modules and adapters.</p>"
        f"{figures.memory_legend()}<div class='scroll'>{figures.memory_bars(columns, budget)}</div>"
        + _table(("bytes", *columns), rows)
        + "</section>"
    )


def _trials(data: ReportData) -> str:
    if not any(trial.loss is not None for trial in data.trials):
        return _failures(data.trials)
    return (
        "<section><h2>Trials</h2>"
        f"{figures.stage_legend(data.trials)}<div class='scroll'>{figures.trial_panels(data.trials)}</div>"
        + _table(("stage", "steps", "trials", "failed", "best loss", "time"), _stage_rows(data.trials))
        + _failures(data.trials)
        + "</section>"
    )


def _stage_rows(trials: Sequence[TrialRow]) -> list[list[str]]:
    rows = []
    for stage, num_steps in dict.fromkeys((trial.stage, trial.num_steps) for trial in trials):
        group = [trial for trial in trials if (trial.stage, trial.num_steps) == (stage, num_steps)]
        losses = [trial.loss for trial in group if trial.loss is not None]
        rows.append(
            [
                stage.replace("_", " "),
                str(num_steps),
                str(len(group)),
                str(len(group) - len(losses)),
                f"{min(losses):.4f}" if losses else "-",
                format_seconds(sum(trial.seconds for trial in group)),
            ]
        )
    return rows


def _failures(trials: Iterable[TrialRow]) -> str:
    failed = [trial for trial in trials if trial.loss is None]
    if not failed:
        return ""
    rows = [[str(trial.number), trial.origin, trial.error or ""] for trial in failed]
    return "<h3>Failed trials</h3>" + _table(("trial", "found by", "error"), rows, num_text_columns=3)


def _reproduction(data: ReportData) -> str:
    directory = str(data.directory)
    commands = []
    if data.recipe is not None:
        recipe = shlex.quote(f"{directory}/recipe.yaml")
        commands.append(f"autoqra search --config {recipe}")
        plan, adapter = shlex.quote(f"{directory}/plan"), shlex.quote(f"{directory}/adapter")
        commands.append(f"autoqra train --config {recipe} --plan {plan} --output_dir {adapter}")
    commands.append(f"autoqra report {shlex.quote(directory)}")
    blocks = [f"<pre><code>{escape(chr(10).join(commands))}</code></pre>"]
    if data.recipe is not None:
        blocks.append(f"<h3>recipe.yaml</h3><pre><code>{escape(data.recipe)}</code></pre>")
    if data.identity:
        lines = "\n".join(f"{key}: {value}" for key, value in data.identity.items())
        blocks.append(
            "<details><summary>All that identifies this search</summary>"
            f"<pre><code>{escape(lines)}</code></pre></details>"
        )
    return f"<section><h2>Do it again</h2>{''.join(blocks)}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int = 1) -> str:
    """A table whose first columns are text and whose others are figures."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if i < num_text_columns else ' class=number'}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f"<div class='scroll'><table><thead><tr>{line(header, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"
    )
