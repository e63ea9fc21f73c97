"""Held-out loss against memory: every plan that was compared, the Pareto front, baselines with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_autoqra import colours
from peft_autoqra.drawing import SMALL, WIDTH, Drawing
from peft_autoqra.plan_points import PlanPoint, pareto_front
from peft_autoqra.stage_marks import LINES, MARKERS, legend, stage_title
from peft_autoqra.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

_HEIGHT = 3.5
_LEFT, _RIGHT, _BETWEEN = 0.1, 0.985, 0.085  # shares of the width
_LOW = 0.2  # share of the height
_CROWDED = 0.06  # of the range of bytes
_FAR = 4.0  # times the spread of the better half; worse points are named at the edge, not drawn


def front_figure(points: Sequence[PlanPoint], budget: tuple[int, str] | None) -> Drawing:
    """Draw it, inside of ``with plot_settings():``.

    Args:
        points: at least one.
        budget: bytes and what they limit, where known.
    """
    scope = f" ({budget[1]})" if budget else ""
    drawing = Drawing(WIDTH, _HEIGHT, f"Held-out loss against memory{scope} of {len(points)} plans, and their front")
    top = _highest_shown(points)
    shown = [point for point in points if point.difference <= top]
    crowd = _crowd(shown)
    panels = [(shown, "all plans"), (crowd, "where most of them are")] if crowd else [(shown, "")]
    width = (_RIGHT - _LEFT - _BETWEEN * (len(panels) - 1)) / len(panels)
    for index, (inside, title) in enumerate(panels):
        axes = drawing.figure.add_axes((_LEFT + index * (width + _BETWEEN), 0.135, width, 0.72))
        axes.set_title(title)
        _draw_panel(drawing, axes, inside, budget)
        axes.set_xlabel(f"memory{scope}, {_unit(inside)[0]}")
    drawing.figure.axes[0].set_ylabel("held-out loss minus the winner's, nats per token")
    lines = ("Pareto front", "budget") if budget else ("Pareto front",)
    legend(drawing.figure, [point.stage for point in points], lines)
    if len(shown) < len(points):
        worst = max(point.difference for point in points)
        note = f"{len(points) - len(shown)} worse, up to {worst:+.2f}, not drawn"
        axes = drawing.figure.axes[0]
        axes.text(0.01, 0.98, note, transform=axes.transAxes, va="top", size=SMALL, color=colours.SOFT)
    return drawing


def _crowd(points: Sequence[PlanPoint]) -> list[PlanPoint]:
    """Most of the points, where they would lie on top of each other: searched plans use the budget up."""
    sizes = [point.total_bytes for point in points]
    middle, reach = statistics.median(sizes), _CROWDED * (max(sizes) - min(sizes))
    near = [point for point in points if abs(point.total_bytes - middle) <= reach]
    return near if len(points) / 2 < len(near) < len(points) else []


def _draw_panel(drawing: Drawing, axes: Axes, points: Sequence[PlanPoint], budget: tuple[int, str] | None) -> None:
    divisor = _unit(points)[1]
    front = pareto_front(points)
    axes.plot(
        [point.total_bytes / divisor for point in front],
        [point.difference for point in front],
        color=colours.INK,
        linewidth=1.2,
        drawstyle="steps-post",
        zorder=2,
    )
    for point in points:
        _mark(drawing, axes, point, divisor)
    axes.grid(color=colours.LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.1, y=0.13)
    axes.ticklabel_format(useOffset=False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(_ticks(5))
    if budget:
        x = budget[0] / divisor
        axes.axvline(x, color=colours.SOFT, linewidth=1.2, linestyle=LINES["budget"]["linestyle"], zorder=1)
    _name_points(drawing, axes, points, divisor)


def _ticks(num: int) -> Locator:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    return MaxNLocator(num)


def _unit(points: Sequence[PlanPoint]) -> tuple[str, float]:
    unit = format_bytes(max(point.total_bytes for point in points)).split()[1]
    return unit, {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]


def _highest_shown(points: Sequence[PlanPoint]) -> float:
    """The largest difference, unless a few far ones would squeeze the rest; what has a name is shown."""
    differences = sorted(point.difference for point in points)
    middle = statistics.median(differences)
    limit = middle + _FAR * max(middle - differences[0], 0.01)
    named = [point.difference for point in points if point.name]
    return max([difference for difference in differences if difference <= limit] + named)


def _mark(drawing: Drawing, axes: Axes, point: PlanPoint, divisor: float) -> None:
    x, colour = point.total_bytes / divisor, colours.STAGES.get(point.stage, colours.STAGES["baseline"])
    low, high = point.interval
    is_known = math.isfinite(low) and low < high
    if point.name and is_known:
        errors = [[point.difference - low], [high - point.difference]]
        axes.errorbar([x], [point.difference], errors, fmt="none", color=colour, capsize=3, linewidth=1.2, zorder=3)
    (mark,) = axes.plot(
        [x],
        [point.difference],
        marker=MARKERS.get(point.stage, "s"),
        markersize=9 if point.name else 5.5,
        markerfacecolor=colour,
        markeredgecolor=colours.PAGE,
        linestyle="none",
        markeredgewidth=0.8,
        zorder=4 if point.name else 5,
    )
    hint = f"{point.name or stage_title(point.stage)}: {format_bytes(point.total_bytes)}, loss {point.loss:.4f}, "
    hint += f"minus the winner's {point.difference:+.4f}"
    drawing.hint(mark, hint + (f", 95% interval {low:+.4f} to {high:+.4f}" if is_known else ""))


def _name_points(drawing: Drawing, axes: Axes, points: Sequence[PlanPoint], divisor: float) -> None:
    """Towards the middle, above the mark, or below those at the bottom; further away where another name is."""
    drawing.figure.draw_without_rendering()
    height = axes.bbox.height / drawing.figure.dpi * 72
    taken: list[tuple[bool, float]] = []
    for point in sorted((point for point in points if point.name), key=lambda point: point.difference):
        position = (point.total_bytes / divisor, point.difference)
        x, y = axes.transLimits.transform(position)
        is_right, is_low = bool(x > 0.5), y < _LOW
        step = -SMALL * 1.3 if is_low else SMALL * 1.3
        level = y * height + step
        while any(side == is_right and abs(level - other) < SMALL * 1.3 for side, other in taken):
            level += step
        taken.append((is_right, level))
        axes.annotate(
            point.name or "",
            position,
            xytext=(-7 if is_right else 7, level - y * height),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="center",
            size=SMALL,
            color=colours.INK,
            zorder=6,
        )
