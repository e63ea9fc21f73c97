"""The figures of a report as inline SVG; colours come from the page's style sheet, so they follow dark and light."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.plan_grid import PlanGrid
from peft_autoqra.report_data import TrialRow
from peft_autoqra.units import format_bytes

STAGES = ("baseline", "uniform", "allocation", "evolution", "trust_region")
MEMORY_PARTS = {
    "weight_bytes": "planned weights",
    "metadata_bytes": "metadata",
    "untouched_bytes": "untouched modules",
    "adapter_bytes": "adapters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer states",
}
_CELL_WIDTH, _CELL_HEIGHT, _LABEL_WIDTH, _HEADER_HEIGHT = 60, 20, 64, 22
_LABEL_CHARACTERS = 9
_CHART_WIDTH, _PANEL_HEIGHT, _LEFT, _TOP, _BOTTOM = 680, 150, 56, 26, 22
_BAR_HEIGHT, _BAR_LEFT, _BAR_WIDTH = 20, 120, 440


def plan_heat_map(plan: BitRankPlan) -> str:
    """Layers down, module types across; colour is bits, the area of the dot is rank."""
    grid = PlanGrid.from_names(plan)
    max_rank = max(layer.rank for layer in plan.values())
    body = [
        _text(_LABEL_WIDTH + _CELL_WIDTH * (i + 0.5), 14, column.rsplit(".", 1)[-1], "middle")
        for i, column in enumerate(grid.columns)
    ]
    body += [
        _text(_LABEL_WIDTH - 8, _HEADER_HEIGHT + row * _CELL_HEIGHT + 14, _row_title(label), "end")
        for row, label in enumerate(grid.row_labels)
    ]
    for (row, column), name in grid.cells.items():
        x, y = _LABEL_WIDTH + column * _CELL_WIDTH, _HEADER_HEIGHT + row * _CELL_HEIGHT
        body.append(_cell(x, y, name, plan[name], max_rank))
    width = _LABEL_WIDTH + len(grid.columns) * _CELL_WIDTH
    height = _HEADER_HEIGHT + len(grid.rows) * _CELL_HEIGHT + 4
    return _svg(width, height, f"Bits and rank of {len(plan)} modules", body)


def heat_map_legend(plan: BitRankPlan) -> str:
    """Which colour is which bit-width and how large a dot is which rank."""
    max_rank = max(layer.rank for layer in plan.values())
    ranks = sorted({layer.rank for layer in plan.values()})
    shown = ranks if len(ranks) <= 6 else [ranks[round(i * (len(ranks) - 1) / 5)] for i in range(6)]
    bits = "".join(
        f'<span class="key"><i class="swatch bits{b}"></i>{b} bits</span>'
        for b in sorted({x.bits for x in plan.values()})
    )
    dots = "".join(
        f'<span class="key"><svg width="18" height="18" aria-hidden="true">{_dot(9, 9, rank, max_rank)}</svg>'
        f"rank {rank}</span>"
        for rank in shown
    )
    return f'<p class="legend">{bits}</p><p class="legend">{dots}</p>'


def trial_panels(trials: Sequence[TrialRow]) -> str:
    """Loss of every trial in order, one panel for each number of training steps."""
    completed = [trial for trial in trials if trial.loss is not None]
    all_steps = sorted({trial.num_steps for trial in completed})
    last = max((trial.number for trial in trials), default=0)
    body: list[str] = []
    for index, num_steps in enumerate(all_steps):
        panel = [trial for trial in completed if trial.num_steps == num_steps]
        body += _panel(panel, num_steps, index * (_PANEL_HEIGHT + _TOP + _BOTTOM), last)
    height = len(all_steps) * (_PANEL_HEIGHT + _TOP + _BOTTOM)
    body.append(_text(_CHART_WIDTH - 16, height - 4, "trials in order →", "end"))
    return _svg(_CHART_WIDTH, height, "Loss of every trial in order", body)


def stage_legend(trials: Iterable[TrialRow]) -> str:
    """Which mark is which stage."""
    stages = list(dict.fromkeys(trial.stage for trial in trials))
    keys = (
        f'<span class="key"><svg width="14" height="14" aria-hidden="true">{_mark(7, 7, stage, "")}</svg>'
        f"{escape(stage.replace('_', ' '))}</span>"
        for stage in stages
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def memory_bars(columns: Mapping[str, MemoryEstimate], budget: tuple[int, str] | None) -> str:
    """One stacked bar for each plan, with the budget as a line."""
    longest = max([memory.total_bytes for memory in columns.values()] + ([budget[0]] if budget else []))
    scale = _BAR_WIDTH / longest
    body: list[str] = []
    for index, (name, memory) in enumerate(columns.items()):
        x, y = float(_BAR_LEFT), _TOP + index * (_BAR_HEIGHT + 10)
        body.append(_text(_BAR_LEFT - 8, y + 14, name, "end"))
        for part, title in MEMORY_PARTS.items():
            num_bytes = getattr(memory, part)
            body.append(
                f'<rect class="{part}" x="{x:.1f}" y="{y}" width="{max(num_bytes * scale, 0):.1f}" '
                f'height="{_BAR_HEIGHT}"><title>{escape(name)}: {title} {num_bytes:,} bytes</title></rect>'
            )
            x += num_bytes * scale
        body.append(_text(_BAR_LEFT + _BAR_WIDTH + 10, y + 14, format_bytes(memory.total_bytes), "start"))
    height = _TOP + len(columns) * (_BAR_HEIGHT + 10)
    if budget:
        x = _BAR_LEFT + budget[0] * scale
        body.append(f'<line class="budget" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{height - 4}"/>')
        body.append(_text(x, 14, f"budget ({budget[1]})", "middle"))
    return _svg(_CHART_WIDTH, height, "Memory by part", body)


def memory_legend() -> str:
    """Which colour is which part."""
    keys = (f'<span class="key"><i class="swatch {part}"></i>{title}</span>' for part, title in MEMORY_PARTS.items())
    return f'<p class="legend">{"".join(keys)}</p>'


def _row_title(label: str) -> str:
    """Long names of stacks lose their front: the hint on each cell has the whole name."""
    title = f"layer {label}" if label.isdecimal() else label
    return title if len(title) <= _LABEL_CHARACTERS else "…" + title[1 - _LABEL_CHARACTERS :]


def _cell(x: float, y: float, name: str, layer: LayerPlan, max_rank: int) -> str:
    title = f"{escape(name)}: {layer.bits} bits, rank {layer.rank}"
    return (
        f'<g><title>{title}</title><rect class="bits{layer.bits}" x="{x + 1}" y="{y + 1}" width="{_CELL_WIDTH - 2}" '
        f'height="{_CELL_HEIGHT - 2}" rx="2"/>'
        f"{_dot(x + _CELL_WIDTH / 2, y + _CELL_HEIGHT / 2, layer.rank, max_rank)}</g>"
    )


def _dot(x: float, y: float, rank: int, max_rank: int) -> str:
    if not rank:
        return ""
    return f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="{max(7.5 * math.sqrt(rank / max_rank), 1.5):.2f}"/>'


def _panel(trials: Sequence[TrialRow], num_steps: int, top: float, last_number: int) -> list[str]:
    losses = sorted(trial.loss for trial in trials if trial.loss is not None)
    low, high = losses[0], _clipped_maximum(losses)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    y0, plot_width = top + _TOP, _CHART_WIDTH - _LEFT - 16

    def height_of(loss: float) -> float:
        return y0 + _PANEL_HEIGHT * (high - min(loss, high)) / (high - low)

    num_clipped = sum(loss > high for loss in losses)
    title = "before training" if num_steps == 0 else f"after {num_steps} steps"
    clipped = f"; {num_clipped} above the top, up to {losses[-1]:.2f}" if num_clipped else ""
    body = [_text(_LEFT, top + 16, f"Held-out loss {title}{clipped}", "start", "panel-title")]
    for tick in ticks:
        y = height_of(tick)
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{_CHART_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(_LEFT - 6, y + 4, f"{tick:.4g}", "end"))
    for trial in trials:
        x = _LEFT + 8 + (plot_width - 16) * trial.number / max(last_number, 1)
        label = f"trial {trial.number}, {trial.origin}: {trial.loss:.4f}, {format_bytes(trial.total_bytes)}"
        body.append(_mark(x, height_of(trial.loss or low), trial.stage, label))
    return body


def _clipped_maximum(losses: Sequence[float]) -> float:
    """The largest loss, unless a few far ones among many would squeeze the rest."""
    if len(losses) < 10:
        return losses[-1]
    middle = statistics.median(losses)
    limit = middle + 4 * max(middle - losses[0], 0.01)
    return max(loss for loss in losses if loss <= limit)


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers that enclose a range."""
    span = max(high - low, 1e-3)
    raw = span / 3
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _mark(x: float, y: float, stage: str, title: str) -> str:
    """Each stage has a shape of its own, so that colour is not needed to tell stages apart."""
    index = STAGES.index(stage) if stage in STAGES else 0
    shapes = (
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"',
        f'<path d="M{x - 5:.1f} {y + 4:.1f}l5-9l5 9z" transform="rotate(180 {x:.1f} {y:.1f})"',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"',
        f'<path d="M{x:.1f} {y - 5.5:.1f}l5 9h-10z"',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z"',
    )
    return (
        f'{shapes[index]} class="mark {STAGES[index]}"><title>{escape(title)}</title></{shapes[index][1:].split()[0]}>'
    )


def _text(x: float, y: float, text: str, anchor: str, css_class: str = "") -> str:
    css = f' class="{css_class}"' if css_class else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{escape(text)}</text>'


def _svg(width: float, height: float, label: str, body: Iterable[str]) -> str:
    return (
        f'<svg class="figure" role="img" aria-label="{escape(label)}" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )
