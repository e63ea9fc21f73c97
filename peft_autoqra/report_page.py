"""The page of a report, and the files beside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from peft_autoqra import report_tables as tables
from peft_autoqra.drawing import Drawing, plot_settings
from peft_autoqra.front_figure import front_figure
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_figure import memory_figure
from peft_autoqra.plan_picture import plan_drawing
from peft_autoqra.report_analysis import distinct_plans, stage_shares
from peft_autoqra.report_data import ReportData
from peft_autoqra.report_html import code_block, details, facts_list, figure, html_table, page, section
from peft_autoqra.report_tables import Table, text_column
from peft_autoqra.stage_figure import stage_figure
from peft_autoqra.stage_marks import stage_title
from peft_autoqra.timeline_figure import timeline_figure
from peft_autoqra.units import format_bytes, format_seconds

_PLAN_CAPTION = (
    "Layers down, module types across. Colour is bits, the area of a dot is rank; no dot means no adapter. Point at a "
    "cell for its module."
)
_FRONT_CAPTION = (
    "Every plan at the last fidelity. {Lower} is better, further left is smaller; right of the dashed line is over "
    "the budget. The line is the Pareto front: plans that no other beats in both. Differences are of the same "
    "held-out sequences and training seeds; the bars of named plans are 95% intervals."
)
_MEMORY_CAPTION = (
    "Bytes while training. Blue and grey are frozen, orange is trained. Activations are not counted. Stored are "
    "weights, metadata, untouched modules and adapters."
)
_TIMELINE_CAPTION = (
    "Every trial: a line from its start to its end, and the {loss} at its end, {lower} is better. Different panels "
    "cannot be compared. The confirmation trains with other seeds, which lie elsewhere; the best so far is of the "
    "first seed alone."
)
_STAGES_CAPTION = (
    "Right of zero: the stage found a better plan than all stages before it. The {loss} is of the last fidelity and "
    "the first seed; the interval is of that one comparison, and each stage shows the best of its plans, "
    "so small gains may be luck. Whether the search won is what the verdict says, over several seeds."
)
_COMPARED_NOTE = (
    "{Figure} on the same held-out sequences after {steps} training steps, mean over the seeds; seeds "
    "differ, so compare plans by the difference, which is of the seeds that both had. Winner minus this: mean and 95% "
    "interval over sequences and seeds; {below} 0 favours the winner. The winner was chosen on these sequences, so "
    "report final figures on others."
)


@dataclass(frozen=True)
class Report:
    """What is written.

    Attributes:
        page: HTML; it loads nothing from elsewhere.
        files: name to content of the figures and tables.
    """

    page: str
    files: Mapping[str, bytes]


def build_report(data: ReportData, folder: str) -> Report:
    """Draw the figures and put the page together.

    Args:
        data: of a search or a plan.
        folder: name of the folder beside the page that gets the files.
    """
    builder = _Builder(data)
    with plot_settings():
        sections = [
            builder.comparison(),
            builder.plan(),
            builder.memory(),
            builder.timeline(),
            builder.stages(),
            builder.failures(),
            _reproduction(data),
        ]
    names = ", ".join(builder.files)
    files = section(
        "Files", f"<p>Figures and tables lie in <code>{escape(folder)}/</code> beside this page: {names}.</p>"
    )
    return Report(page(_title(data), _heading(data), [s for s in (*sections, files) if s]), builder.files)


@dataclass
class _Builder:
    """Makes sections, and collects the files of their figures and tables."""

    data: ReportData
    files: dict[str, bytes] = field(default_factory=dict)

    def comparison(self) -> str:
        data = self.data
        body = f"<p class='verdict'>{escape(data.verdict)}</p>" if data.verdict else ""
        if data.points:
            body += self._figure(
                "front", front_figure(data.points, data.budget, data.objective), self._say(_FRONT_CAPTION)
            )
        if data.compared:
            scope = data.budget and data.budget[1]
            body += self._table(tables.compared_table(distinct_plans(data.compared), scope, data.objective))
            body += f"<p class='note'>{escape(self._say(_COMPARED_NOTE, steps=data.compared[0].num_steps))}</p>"
        return section(self._say("{Loss} and memory"), body)

    def plan(self) -> str:
        plan = self.data.plan
        if plan is None:
            return ""
        table = details(f"Bits and rank of {len(plan)} modules", self._table(tables.plan_modules_table(plan)))
        drawing = plan_drawing(plan)
        if drawing is None:
            return section("Plan", "<p>It has too many layers or module types for a legible picture.</p>" + table)
        return section("Plan", self._figure("plan", drawing, _PLAN_CAPTION) + table)

    def memory(self) -> str:
        columns = _memories(self.data)
        if not columns:
            return ""
        drawing = memory_figure(columns, self.data.budget)
        table = self._table(tables.memory_table(columns))
        return section("Memory by part", self._figure("memory", drawing, _MEMORY_CAPTION) + table)

    def timeline(self) -> str:
        trials, objective = self.data.trials, self.data.objective
        if not any(trial.loss is not None for trial in trials):
            return ""
        return section(
            "Trials",
            self._figure("timeline", timeline_figure(trials, objective), self._say(_TIMELINE_CAPTION))
            + self._table(tables.fidelity_table(trials, objective))
            + details(f"All {len(trials)} trials", self._table(tables.trial_table(trials, objective))),
        )

    def stages(self) -> str:
        data = self.data
        if not data.trials:
            return ""
        shares = stage_shares(data.trials, data.calibration)
        body = self._figure("stages", stage_figure(shares, data.objective), self._say(_STAGES_CAPTION))
        body += self._table(tables.stage_table(shares, data.objective))
        if data.surrogate_checks:
            body += self._table(tables.surrogate_table(data.surrogate_checks))
        return section("What each stage contributed", body)

    def failures(self) -> str:
        failed = [trial for trial in self.data.trials if trial.loss is None]
        if not failed:
            return ""
        columns = [
            text_column("trial", "trial", [str(trial.number) for trial in failed]),
            text_column("found by", "found_by", [trial.origin for trial in failed]),
            text_column("error", "error", [trial.error for trial in failed]),
        ]
        return section("Failed trials", self._table(Table(name="failed", caption="What went wrong", columns=columns)))

    def _say(self, text: str, **values: Any) -> str:
        """A text about what plans were chosen for."""
        objective = self.data.objective
        lower, below = ("higher", "above") if objective.greater_is_better else ("lower", "below")
        loss = objective.short_name
        values |= {"loss": loss, "Loss": loss[:1].upper() + loss[1:], "Figure": objective.heading}
        if objective.unit:
            values["Figure"] += f" in {objective.unit}"
        return text.format(lower=lower, Lower=lower.capitalize(), below=below, **values)

    def _figure(self, name: str, drawing: Drawing, caption: str) -> str:
        self.files[f"{name}.png"] = drawing.to_png()
        return figure(drawing.to_svg(name), drawing.title, caption)

    def _table(self, table: Table) -> str:
        self.files[f"{table.name}.csv"] = table.to_csv().encode()
        return html_table(table)


def _memories(data: ReportData) -> dict[str, MemoryEstimate]:
    """Name to bytes."""
    found = {plan.name: plan.memory for plan in distinct_plans(data.compared) if plan.memory is not None}
    if not found and data.plan is not None and data.plan.memory is not None:
        return {"plan": data.plan.memory}
    return found


def _title(data: ReportData) -> str:
    base = data.plan.base_model.name_or_path if data.plan else None
    return f"AutoQRA: {Path(base).name if base else data.directory.resolve().name}"


def _heading(data: ReportData) -> str:
    facts = []
    if data.budget is not None:
        facts.append(("budget", f"{format_bytes(data.budget[0])} ({data.budget[1]})"))
    if data.compared:
        stage = stage_title(data.compared[0].origin.partition(":")[0])
        facts.append(("winner", f"{stage} plan"))
    if data.plan is not None:
        facts.append(("average bits, rank", f"{data.plan.average_bits:.2f}, {data.plan.average_rank:.1f}"))
    if data.trials:
        failed = sum(trial.loss is None for trial in data.trials)
        facts.append(("trials", f"{len(data.trials)}" + (f", {failed} failed" if failed else "")))
    if data.seconds is not None:
        facts.append(("search time", format_seconds(data.seconds)))
    if data.cost is not None:
        facts.append(("cost, full fine-tunes", f"{data.cost[0]:.2f} of {data.cost[1]:g}"))
    unfinished = data.trials and not data.compared
    note = "<p>This search has no result yet; the page shows what is there so far.</p>" if unfinished else ""
    return note + facts_list(facts)


def _reproduction(data: ReportData) -> str:
    return section("Do it again", code_block(_commands(data)) + _settings(data))


def _commands(data: ReportData) -> Sequence[str]:
    directory = data.directory
    report = f"autoqra report {shlex.quote(str(directory))}"
    if data.recipe is None:
        return [*(["# The search was started from Python; its settings are below."] if data.identity else []), report]
    recipe, plan, adapter = (shlex.quote(str(directory / name)) for name in ("recipe.yaml", "plan", "adapter"))
    return [
        f"autoqra search --config {recipe}",
        report,
        f"autoqra train --config {recipe} --plan {plan} --output_dir {adapter}",
        f"autoqra push {adapter} --repo_id me/my-adapter --private",
    ]


def _settings(data: ReportData) -> str:
    body = ""
    if data.recipe is not None:
        body += "<h3>recipe.yaml</h3>" + code_block([data.recipe.rstrip()])
    if data.identity:
        lines = [f"{key}: {value}" for key, value in data.identity.items()]
        body += details("All that identifies this search", code_block(lines))
    return body
