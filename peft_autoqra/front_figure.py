"""What plans were chosen by against memory: every plan that was compared, the Pareto front, baselines, intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from peft_autoqra import colours
from peft_autoqra.drawing import SMALL, WIDTH, Drawing, label_as_figure
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.plan_points import PlanPoint, pareto_front
from peft_autoqra.stage_marks import LINES, MARKERS, legend, stage_title
from peft_autoqra.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

_HEIGHT = 3.5
_LEFT, _RIGHT, _BETWEEN = 0.1, 0.985, 0.085  # shares of the width
_CHARACTER, _LINE = 0.6, SMALL * 1.3  # width of a letter as a share of its height; height of a line in points
_CROWDED, _MIN_CROWD = 0.06, 4  # of the range of bytes; points
_LEAST_RANGE = 0.004  # of nats per token, or another figure; smaller differences look as small as they are
_FAR = 4.0  # times the spread of the better half; worse points are named at the edge, not drawn


def front_figure(
    points: Sequence[PlanPoint], budget: tuple[int, str] | None, objective: ObjectiveInfo = HELD_OUT_LOSS
) -> Drawing:
    """Draw it, inside of ``with plot_settings():``.

    Args:
        points: at least one.
        budget: bytes and what they limit, where known.
        objective: what losses are of; the figure itself is drawn.
    """
    scope = f" ({budget[1]})" if budget else ""
    drawing = Drawing(
        WIDTH, _HEIGHT, f"{objective.heading} against memory{scope} of {len(points)} plans, and their front"
    )
    top = _highest_shown(points)
    shown = [point for point in points if point.difference <= top]
    crowd = _crowd(shown)
    panels = [(shown, "all plans"), (crowd, "enlarged: where most of them are")] if crowd else [(shown, "")]
    width = (_RIGHT - _LEFT - _BETWEEN * (len(panels) - 1)) / len(panels)
    for index, (inside, title) in enumerate(panels):
        axes = drawing.figure.add_axes((_LEFT + index * (width + _BETWEEN), 0.135, width, 0.72))
        axes.set_title(title)
        _draw_panel(drawing, axes, inside, budget, objective, is_enlarged=index > 0)
        _name_points(drawing, axes, inside, _unit(inside)[1], unnamed=crowd if index == 0 else ())
        axes.set_xlabel(f"memory{scope}, {_unit(inside)[0]}")
    drawing.figure.axes[0].set_ylabel(
        objective.title.replace(objective.name, f"{objective.name} minus the winner's", 1)
    )
    lines = ("Pareto front", "budget") if budget else ("Pareto front",)
    legend(drawing.figure, [point.stage for point in points], lines)
    if len(shown) < len(points):
        worst = objective.figure(max(point.difference for point in points))
        reach = "down" if objective.greater_is_better else "up"
        note = f"{len(points) - len(shown)} worse, {reach} to {worst:+.2f}, not drawn"
        axes = drawing.figure.axes[0]
        axes.text(0.01, 0.98, note, transform=axes.transAxes, va="top", size=SMALL, color=colours.SOFT)
    return drawing


def _crowd(points: Sequence[PlanPoint]) -> list[PlanPoint]:
    """Most of the points, where they would lie on top of each other: searched plans use the budget up."""
    sizes = [point.total_bytes for point in points]
    middle, reach = statistics.median(sizes), _CROWDED * (max(sizes) - min(sizes))
    near = [point for point in points if abs(point.total_bytes - middle) <= reach]
    return near if max(len(points) / 2, _MIN_CROWD) < len(near) < len(points) else []


def _draw_panel(
    drawing: Drawing,
    axes: Axes,
    points: Sequence[PlanPoint],
    budget: tuple[int, str] | None,
    objective: ObjectiveInfo,
    *,
    is_enlarged: bool,
) -> None:
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
        _mark(drawing, axes, point, divisor, objective)
    axes.grid(color=colours.LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.1, y=0.13)
    low, high = axes.get_ylim()
    missing = max(0.0, _LEAST_RANGE - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)
    axes.ticklabel_format(useOffset=False, style="plain")
    label_as_figure(axes, objective)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(_ticks(5))
    if budget and _is_near(budget[0], points, is_enlarged):
        x = budget[0] / divisor
        axes.axvline(x, color=colours.SOFT, linewidth=1.2, linestyle=LINES["budget"]["linestyle"], zorder=1)


def _is_near(budget_bytes: int, points: Sequence[PlanPoint], is_enlarged: bool) -> bool:
    """Whether there is room for the budget; it would squeeze what was enlarged."""
    sizes = [point.total_bytes for point in points]
    return not is_enlarged or budget_bytes <= max(sizes) + (max(sizes) - min(sizes)) / 2


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


def _mark(drawing: Drawing, axes: Axes, point: PlanPoint, divisor: float, objective: ObjectiveInfo) -> None:
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
    hint = f"{point.name or stage_title(point.stage)}: {format_bytes(point.total_bytes)}, {objective.short_name} "
    hint += f"{objective.figure(point.loss):.4f}, minus the winner's {objective.figure(point.difference):+.4f}"
    if is_known:
        low, high = objective.interval(low, high)
        hint += f", 95% interval {low:+.4f} to {high:+.4f}"
    drawing.hint(mark, hint)


def _name_points(
    drawing: Drawing, axes: Axes, points: Sequence[PlanPoint], divisor: float, *, unnamed: Sequence[PlanPoint]
) -> None:
    """Beside each mark with a name, where the name covers the fewest other marks and no other name."""
    drawing.figure.draw_without_rendering()
    scale = 72 / drawing.figure.dpi
    pixels = axes.transData.transform([(point.total_bytes / divisor, point.difference) for point in points])
    places = [(float(x) * scale, float(y) * scale) for x, y in pixels]
    frame = [edge * scale for edge in axes.bbox.extents]
    taken: list[_Box] = []
    for point, (x, y) in zip(points, places, strict=True):
        if not point.name or point in unnamed:
            continue
        width = len(point.name) * SMALL * _CHARACTER
        boxes = [
            _Box(x + dx - width * (dx < 0), y + dy, width)
            for dy in (_LINE, -_LINE, 2 * _LINE, -2 * _LINE, 3 * _LINE, -3 * _LINE)
            for dx in (-7, 7)
        ]
        box = min(boxes, key=lambda box: box.covered(places, taken, frame))
        taken.append(box)
        axes.annotate(
            point.name,
            (point.total_bytes / divisor, point.difference),
            xytext=(box.left - x, box.middle - y),
            textcoords="offset points",
            va="center",
            size=SMALL,
            color=colours.INK,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": colours.SOFT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )


class _Box(NamedTuple):
    """Where a name would stand, in points."""

    left: float
    middle: float
    width: float

    def covered(self, places: Sequence[tuple[float, float]], boxes: Sequence[_Box], frame: Sequence[float]) -> int:
        """Marks under it; names and the frame count as ten."""
        right, half = self.left + self.width, _LINE / 2
        marks = sum(self.left - 3 < x < right + 3 and abs(self.middle - y) < half + 3 for x, y in places)
        names = sum(
            self.left < other.left + other.width and other.left < right and abs(self.middle - other.middle) < _LINE
            for other in boxes
        )
        low, high = self.middle - half, self.middle + half
        is_outside = self.left < frame[0] or right > frame[2] or low < frame[1] or high > frame[3]
        return marks + 10 * names + 10 * is_outside
