"""Losses beside QLoRA's as pictures: method by method, and over memory."""

from __future__ import annotations

import hashlib
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.finetune.budget import STORED_PREFIX
from benchmarks.finetune.comparison import Effect
from benchmarks.finetune.results import Results
from benchmarks.finetune.titles import METHODS, base_name, cell_title, method_title
from peft_autoqra import colours
from peft_autoqra.drawing import SMALL, Drawing, plot_settings
from peft_autoqra.memory_estimate import MemoryScope

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 8.4  # inches
_ROW = 0.2  # of a method
_CHARACTER = 0.054  # of a method's title, with room to spare
_TOP, _PANEL = 0.75, 2.6  # of the legend; of a row of panels
_DOTS = 150  # per inch
_FAR = 1.6  # times the range of what is compared; points beyond are named, not drawn


@dataclass(frozen=True)
class Point:
    """A cell in a picture.

    Attributes:
        task: name.
        method: name.
        budget: None without one.
        training_bytes: measured.
        stored_bytes: measured.
        effect: loss minus the baseline's; None for the baseline itself.
    """

    task: str
    method: str
    budget: str | None
    training_bytes: int
    stored_bytes: int
    effect: Effect | None

    @property
    def difference(self) -> float:
        """Of the losses."""
        return self.effect.value if self.effect else 0.0

    def num_bytes(self, scope: MemoryScope) -> int:
        """Of an account."""
        return self.training_bytes if scope == "training" else self.stored_bytes


def points_of(results: Results) -> list[Point]:
    """All cells of tasks that the baseline was run on."""
    points = []
    for (task, method, budget), runs in results.cells.items():
        if task in results.tasks and runs.runs:
            sizes = [record.memory.measured for record in runs.records if record.memory is not None]
            training, stored = (
                int(statistics.median(size.in_scope(scope) for size in sizes)) for scope in ("training", "stored")
            )
            points.append(Point(task, method, budget, training, stored, results.loss_to_baseline(runs)))
    return points


def fingerprint(points: Sequence[Point]) -> str:
    """Of what is drawn. Pictures carry it: other versions of matplotlib make other bytes of the same points."""
    texts = [
        f"{point.task} {point.method} {point.budget} {point.training_bytes} {point.stored_bytes} {_figures(point)}"
        for point in points
    ]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _figures(point: Point) -> str:
    """Rounded: other versions of NumPy have other last digits."""
    bounds = point.effect.interval if point.effect else ()
    return " ".join(f"{value:.4f}" for value in (point.difference, *bounds))


def differences_picture(points: Sequence[Point], tasks: Sequence[str]) -> bytes:
    """One panel a task, one line for each method and budget, in the order of the points; PNG."""
    rows = list(dict.fromkeys((point.method, point.budget) for point in points))
    height = 0.85 + _ROW * len(rows)
    with plot_settings():
        drawing = Drawing(_WIDTH, height, "Held-out loss of every method minus that of QLoRA r=16, with 95% intervals")
        titles = [cell_title(*row) for row in rows]
        left, bottom = (0.15 + _CHARACTER * max(map(len, titles))) / _WIDTH, 0.45 / height
        width = (0.985 - left) / len(tasks)
        for index, task in enumerate(tasks):
            box = (left + index * width, bottom, width * 0.93, 1 - bottom - 0.3 / height)
            axes = drawing.figure.add_axes(box)
            _draw_differences(axes, [point for point in points if point.task == task], rows)
            axes.set_title(task)
            axes.set_yticks(range(len(rows)), titles if index == 0 else [""] * len(rows))
        drawing.figure.text(
            0.985, 0.04 / height, "loss minus that of QLoRA r=16, nats per token", ha="right", size=SMALL
        )
        return _png(drawing, fingerprint(points))


def memory_picture(points: Sequence[Point], tasks: Sequence[str]) -> bytes:
    """One panel a task and account: loss over memory, budgets of a method joined; PNG.

    The account of what is stored has a row where there are budgets of it.
    """
    scopes: list[MemoryScope] = ["training", "stored"] if any(map(_is_stored, points)) else ["training"]
    height = _TOP + _PANEL * len(scopes)
    with plot_settings():
        drawing = Drawing(_WIDTH, height, "Held-out loss over memory, for every method and budget")
        left, width = 0.08, (0.99 - 0.08) / len(tasks)
        for row, scope in enumerate(scopes):
            inside = [point for point in points if point.budget is None or _is_stored(point) == (scope == "stored")]
            for column, task in enumerate(tasks):
                box = (
                    left + column * width,
                    (_PANEL * (len(scopes) - 1 - row) + 0.45) / height,
                    width * 0.78,
                    (_PANEL - 0.75) / height,
                )
                axes = drawing.figure.add_axes(box)
                _draw_memory(axes, [point for point in inside if point.task == task], scope)
                axes.set_title(task)
                axes.set_xlabel(f"memory ({scope}), MB")
                if column == 0:
                    axes.set_ylabel("loss minus that of QLoRA r=16")
        _legend(drawing, points)
        return _png(drawing, fingerprint(points))


def _draw_differences(axes: Axes, points: Sequence[Point], rows: Sequence[tuple[str, str | None]]) -> None:
    axes.axvline(0, color=colours.SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    for point in points:
        row = rows.index((point.method, point.budget))
        look = _look(point.method)
        axes.plot(point.difference, row, markersize=6, linestyle="none", **look | {"marker": "o"})
        if point.effect and all(map(math.isfinite, point.effect.interval)):
            axes.plot(point.effect.interval, (row, row), color=look["color"], linewidth=1.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color=colours.LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _draw_memory(axes: Axes, points: Sequence[Point], scope: MemoryScope) -> None:
    top = _highest_shown(points)
    shown = [point for point in points if point.difference <= top]
    axes.axhline(0, color=colours.SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    for method in dict.fromkeys(point.method for point in shown):
        of_method = sorted((p for p in shown if p.method == method), key=lambda point: point.num_bytes(scope))
        x, y = [p.num_bytes(scope) / 1e6 for p in of_method], [p.difference for p in of_method]
        axes.plot(x, y, markersize=5, linewidth=1.0, **_look(method))
        for point, place in zip(of_method, x, strict=True):
            if _kind(method) == "ours" and point.effect and all(map(math.isfinite, point.effect.interval)):
                axes.plot((place, place), point.effect.interval, color=_look(method)["color"], linewidth=1.4)
    axes.grid(color=colours.LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.08, y=0.08)
    axes.locator_params(nbins=5)
    if len(shown) < len(points):
        worst = max(point.difference for point in points)
        note = f"not drawn: {len(points) - len(shown)}, up to {worst:+.2f}"
        axes.set_title(note, loc="right", size=SMALL, color=colours.SOFT)


def _highest_shown(points: Sequence[Point]) -> float:
    """So far that ours, and methods without a budget, can be told apart."""
    near = [point.difference for point in points if point.budget is None or _kind(point.method) == "ours"]
    return max(near) + (_FAR - 1) * (max(near) - min(near)) if near else math.inf


def _legend(drawing: Drawing, points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - as the package's own drawings do

    methods = dict.fromkeys(point.method for point in points)
    handles = [
        Line2D([], [], markersize=5, linewidth=1.0, label=method_title(name), **_look(name)) for name in methods
    ]
    drawing.figure.legend(handles=handles, loc="upper left", ncols=4, bbox_to_anchor=(0.0, 1.0), columnspacing=1.2)


def _kind(method: str) -> str:
    """What colour tells: ours, others within a budget, and those that take what they take."""
    if method.startswith("autoqra"):
        return "ours"
    return "none" if "lora" in method else "rival"


def _look(method: str) -> dict[str, Any]:
    """A colour for the kind of method and a shape for the method."""
    stage = {"ours": "allocation", "rival": "evolution", "none": "baseline"}[_kind(method)]
    same = [name for name in METHODS if _kind(name) == _kind(method)]
    shape = same.index(base_name(method)) if base_name(method) in same else len(same)
    return {"color": colours.STAGES[stage], "marker": "osD^v<>pPX*h"[shape % 12], "markeredgecolor": colours.PAGE}


def _is_stored(point: Point) -> bool:
    return bool(point.budget and point.budget.startswith(STORED_PREFIX))


def _png(drawing: Drawing, description: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    drawing.figure.set_dpi(_DOTS)
    file, metadata = io.BytesIO(), {"Software": None, "Description": description}
    FigureCanvasAgg(drawing.figure).print_png(file, metadata=metadata, pil_kwargs={"optimize": True})
    return file.getvalue()
