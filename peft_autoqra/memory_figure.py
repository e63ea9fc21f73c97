"""Memory by part: one stacked bar for each plan, and the budget."""

from __future__ import annotations

from collections.abc import Mapping

from peft_autoqra import colours
from peft_autoqra.drawing import SMALL, WIDTH, Drawing
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.units import format_bytes

MEMORY_PARTS = {
    "weight_bytes": "planned weights",
    "metadata_bytes": "quantization metadata",
    "untouched_bytes": "untouched modules",
    "adapter_bytes": "adapters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer states",
}
"""In the order of what is stored first, then what only training holds."""

_STORED = ("weight_bytes", "metadata_bytes", "untouched_bytes", "adapter_bytes")
_RIGHT, _TOP, _BOTTOM, _ROW, _BAR = 0.8, 0.62, 0.1, 0.34, 0.24  # inches
_CHARACTER = 0.072  # inches


def memory_figure(columns: Mapping[str, MemoryEstimate], budget: tuple[int, str] | None) -> Drawing:
    """Draw it, inside of ``with plot_settings():``.

    Args:
        columns: name to bytes by part; at least one.
        budget: bytes and what they limit; None where there is none.
    """
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    drawing = Drawing(WIDTH, _TOP + _ROW * len(columns) + _BOTTOM, "Memory by part, in bytes while training")
    axes = drawing.sheet()
    left = max(0.6, 0.12 + 0.07 * max(len(name) for name in columns))
    longest = max([memory.total_bytes for memory in columns.values()] + ([budget[0]] if budget else []))
    scale = (WIDTH - left - _RIGHT) / longest
    for row, (name, memory) in enumerate(columns.items()):
        x, y = left, _TOP + row * _ROW
        axes.text(left - 0.08, y + _BAR / 2, name, ha="right", va="center_baseline")
        for part, title in MEMORY_PARTS.items():
            num_bytes = getattr(memory, part)
            width = num_bytes * scale
            counts = part in _STORED or budget is None or budget[1] == "training"
            bar = Rectangle((x, y), width, _BAR, facecolor=colours.PARTS[part], edgecolor=colours.PAGE, linewidth=0.6)
            bar.set_alpha(None if counts else 0.45)
            drawing.hint(axes.add_patch(bar), f"{name}: {title} {format_bytes(num_bytes)} ({num_bytes:,} bytes)")
            label = format_bytes(num_bytes)
            if counts and width > _CHARACTER * (len(label) + 1):
                colour = colours.PART_LABELS[part]
                axes.text(
                    x + width / 2, y + _BAR / 2, label, ha="center", va="center_baseline", size=SMALL, color=colour
                )
            x += width
        total = format_bytes(memory.total_bytes)
        axes.text(WIDTH - 0.08, y + _BAR / 2, total, ha="right", va="center_baseline")
    if budget:
        x, bottom = left + budget[0] * scale, _TOP + _ROW * len(columns)
        axes.plot([x, x], [_TOP - 0.06, bottom], color=colours.INK, linewidth=1.2, linestyle=(0, (4, 3)))
        title = f"budget {format_bytes(budget[0])} ({budget[1]})"
        axes.text(x, _TOP - 0.09, title, ha="right", va="baseline", size=SMALL)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=colours.PARTS[part], label=title) for part, title in MEMORY_PARTS.items()
    ]
    drawing.figure.legend(
        handles=handles, loc="upper left", ncols=3, bbox_to_anchor=(0, 1), columnspacing=1.2, borderpad=0.2
    )
    return drawing
