"""What each stage of a search won, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_autoqra import colours
from peft_autoqra.drawing import SMALL, WIDTH, Drawing
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.report_analysis import StageShare
from peft_autoqra.stage_marks import MARKERS, stage_title
from peft_autoqra.units import format_seconds, format_signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOP, _BOTTOM, _ROW = 0.42, 0.42, 0.32  # inches
_PANELS = ((0.15, 0.37), (0.56, 0.16), (0.77, 0.13))  # left edge and width, shares of the figure's
_LEAST_RANGE = 0.004  # of nats per token, or another figure; smaller gains look as small as they are
_OVER = 1.35  # of the longest bar, for its label


def stage_figure(shares: Sequence[StageShare], objective: ObjectiveInfo = HELD_OUT_LOSS) -> Drawing:
    """Draw it, inside of ``with plot_settings():``.

    Args:
        shares: at least one.
        objective: what losses are of.
    """
    height = _TOP + _ROW * len(shares) + _BOTTOM
    won, unit = objective.short_name, objective.unit or objective.name
    title = f"{won[:1].upper()}{won[1:]} that each stage of the search won over the stages before, and what it cost"
    drawing = Drawing(WIDTH, height, title)
    gains, costs, times = (
        drawing.figure.add_axes((left, _BOTTOM / height, width, _ROW * len(shares) / height))
        for left, width in _PANELS
    )
    for axes in (gains, costs, times):
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.set_yticks([])
    gains.set_yticks(range(len(shares)), [stage_title(share.stage) for share in shares], color=colours.INK)
    _draw_gains(drawing, gains, shares, unit)
    _draw_bars(drawing, costs, shares, [(share.cost, f"{share.cost:.2f}") for share in shares])
    _draw_bars(drawing, times, shares, [(share.seconds, format_seconds(share.seconds)) for share in shares])
    gains.set_title(f"{won} won over the best before")
    gains.set_xlabel(f"{unit}, with 95% interval", loc="left")
    costs.set_title("cost")
    costs.set_xlabel("full fine-tunes", loc="left")
    times.set_title("time")
    times.set_xlabel("running", loc="left")
    return drawing


def _draw_gains(drawing: Drawing, axes: Axes, shares: Sequence[StageShare], unit: str) -> None:
    axes.axvline(0.0, color=colours.SOFT, linewidth=1.0)
    axes.grid(axis="x", color=colours.LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    axes.update_datalim([(-_LEAST_RANGE / 2, 0), (_LEAST_RANGE / 2, 0)], updatey=False)
    for row, share in enumerate(shares):
        if share.gain is None:
            text = "nothing before it to compare with" if share.best_loss is not None else _why_none(share)
            ground = {"facecolor": colours.PAGE, "edgecolor": "none", "pad": 1.5}
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "bbox": ground}
            axes.text(0.02, row, text, size=SMALL, color=colours.SOFT, **place)
            continue
        won, (low, high) = -share.gain.mean, (-share.gain.interval[1], -share.gain.interval[0])
        colour = colours.STAGES.get(share.stage, colours.STAGES["baseline"])
        axes.plot([low, high], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt")
        (mark,) = axes.plot(
            [won],
            [row],
            marker=MARKERS.get(share.stage, "s"),
            markersize=8,
            markerfacecolor=colour,
            markeredgecolor=colours.PAGE,
            linestyle="none",
        )
        drawing.hint(
            mark,
            f"{stage_title(share.stage)}: {format_signed(won)} {unit}, "
            f"95% interval {format_signed(low)} to {format_signed(high)}",
        )
        axes.annotate(
            format_signed(won), (won, row), xytext=(0, 6), textcoords="offset points", ha="center", size=SMALL
        )


def _why_none(share: StageShare) -> str:
    if not share.num_trials:
        return "measures what the others start from"
    return "further seeds for the best" if share.stage == "confirmation" else "no trial at the last fidelity"


def _draw_bars(
    drawing: Drawing, axes: Axes, shares: Sequence[StageShare], values: Sequence[tuple[float, str]]
) -> None:
    axes.set_xlim(0, _OVER * max([value for value, _ in values] + [1e-9]))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    for row, (share, (value, label)) in enumerate(zip(shares, values, strict=True)):
        colour = colours.STAGES.get(share.stage, colours.STAGES["baseline"])
        (bar,) = axes.barh([row], [value], height=0.5, color=colour)
        drawing.hint(bar, f"{stage_title(share.stage)}: {label}, {share.num_trials} trials")
        axes.annotate(label, (value, row), xytext=(3, 0), textcoords="offset points", va="center", size=SMALL)
