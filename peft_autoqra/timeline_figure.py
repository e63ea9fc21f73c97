"""What a search tried when: one panel for each fidelity, with the best so far."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from peft_autoqra import colours
from peft_autoqra.drawing import SMALL, WIDTH, Drawing, label_as_figure
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.report_data import TrialRow
from peft_autoqra.stage_marks import MARKERS, legend, stage_title
from peft_autoqra.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOP, _BOTTOM, _PANEL, _BETWEEN = 0.55, 0.42, 1.45, 0.36  # inches
_LEFT, _WIDTH = 0.1, 0.86  # shares of the figure's width
_TIME_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
_LEAST_RANGE = 0.004  # of nats per token, or another figure; smaller differences look as small as they are
_FAR = 4.0  # times the distance of the median from the best; what is worse is counted, not drawn


def timeline_figure(trials: Sequence[TrialRow], objective: ObjectiveInfo = HELD_OUT_LOSS) -> Drawing:
    """Draw it, inside of ``with plot_settings():``.

    Args:
        trials: at least one that succeeded.
        objective: what losses are of; the figure itself is drawn.
    """
    completed = [trial for trial in trials if trial.loss is not None]
    levels = sorted({trial.num_steps for trial in completed})
    height = _TOP + len(levels) * _PANEL + (len(levels) - 1) * _BETWEEN + _BOTTOM
    title = f"{objective.heading} and time of {len(completed)} trials, one panel for each fidelity"
    drawing = Drawing(WIDTH, height, title)
    total = max(trial.end_seconds for trial in completed)
    unit, divisor = next(((unit, size) for unit, size in _TIME_UNITS if total >= 2 * size), _TIME_UNITS[-1])
    for index, num_steps in enumerate(levels):
        bottom = height - _TOP - index * (_PANEL + _BETWEEN) - _PANEL
        axes = drawing.figure.add_axes((_LEFT, bottom / height, _WIDTH, _PANEL / height))
        of_level = [trial for trial in completed if trial.num_steps == num_steps]
        _draw_panel(drawing, axes, of_level, divisor, objective)
        axes.set_xlim(-0.01 * total / divisor, 1.01 * total / divisor)
        if index < len(levels) - 1:
            axes.set_xticklabels([])
    axes.set_xlabel(f"time since the first trial began, {unit}")
    drawing.figure.text(0.012, 0.5, objective.title, rotation=90, va="center", size=SMALL, color=colours.SOFT)
    legend(drawing.figure, [trial.stage for trial in completed], ("best so far",))
    return drawing


def _draw_panel(
    drawing: Drawing, axes: Axes, trials: Sequence[TrialRow], divisor: float, objective: ObjectiveInfo
) -> None:
    losses = [_loss(trial) for trial in trials]
    middle = statistics.median(losses)
    limit = middle + _FAR * max(middle - min(losses), 0.01)
    first_seed = min(trial.seed for trial in trials)
    for trial in trials:
        if _loss(trial) <= limit:
            _mark(drawing, axes, trial, divisor, objective)
    tried = [trial for trial in trials if trial.seed == first_seed]
    best = list(accumulate(map(_loss, tried), min))
    axes.plot(
        [trial.end_seconds / divisor for trial in tried],
        best,
        color=colours.INK,
        linewidth=1.2,
        drawstyle="steps-post",
        zorder=2,
    )
    num_far = sum(loss > limit for loss in losses)
    reach = "down" if objective.greater_is_better else "up"
    far = f"; {num_far} worse, {reach} to {objective.figure(max(losses)):.2f}, not drawn" if num_far else ""
    name = "before training" if trials[0].num_steps == 0 else f"after {trials[0].num_steps} steps"
    axes.set_title(f"{name}: {len(trials)} trials, best {objective.figure(min(best)):.4f}{far}")
    axes.set_ylim(*_limits(min(losses), max(loss for loss in losses if loss <= limit)))
    axes.grid(axis="y", color=colours.LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.ticklabel_format(useOffset=False, style="plain")
    label_as_figure(axes, objective)


def _limits(low: float, high: float) -> tuple[float, float]:
    margin = max(0.1 * (high - low), (_LEAST_RANGE - (high - low)) / 2)
    return low - margin, high + margin


def _mark(drawing: Drawing, axes: Axes, trial: TrialRow, divisor: float, objective: ObjectiveInfo) -> None:
    """A line from its start to its end, and the mark there."""
    colour = colours.STAGES.get(trial.stage, colours.STAGES["baseline"])
    start, end = (trial.end_seconds - trial.seconds) / divisor, trial.end_seconds / divisor
    axes.plot(
        [start, end], [_loss(trial)] * 2, color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="butt", zorder=3
    )
    (mark,) = axes.plot(
        [end],
        [_loss(trial)],
        marker=MARKERS.get(trial.stage, "s"),
        markersize=6.5,
        markerfacecolor=colour,
        markeredgecolor=colours.PAGE,
        linestyle="none",
        markeredgewidth=0.8,
        zorder=4,
    )
    hint = f"trial {trial.number}, {stage_title(trial.origin)}, seed {trial.seed}: {objective.short_name} "
    hint += f"{objective.figure(_loss(trial)):.4f}, "
    drawing.hint(mark, hint + f"{format_bytes(trial.total_bytes)}, {format_seconds(trial.seconds)}")


def _loss(trial: TrialRow) -> float:
    """Of one that succeeded."""
    return math.nan if trial.loss is None else trial.loss
