"""How the stages of a search look in figures: a colour and a shape each, so that colour is not needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from peft_autoqra import colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {"baseline": "s", "allocation": "o", "evolution": "^", "trust_region": "D", "confirmation": "v"}
LINES: dict[str, dict[str, Any]] = {
    "Pareto front": {"color": colours.INK},
    "best so far": {"color": colours.INK},
    "budget": {"color": colours.SOFT, "linestyle": (0, (4, 3))},
}


def stage_title(stage: str) -> str:
    """As people read it."""
    return stage.replace("_", " ")


def legend(figure: Figure, stages: Iterable[str], lines: Sequence[str]) -> None:
    """At the top of the figure.

    Args:
        figure: with room there.
        stages: that occur in it, in any order and number.
        lines: names of lines that occur in it.
    """
    from matplotlib.lines import Line2D  # noqa: PLC0415

    there = set(stages)
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            markersize=6,
            markerfacecolor=colours.STAGES[stage],
            markeredgecolor=colours.PAGE,
            label=stage_title(stage),
        )
        for stage, marker in MARKERS.items()
        if stage in there
    ]
    handles += [Line2D([], [], linewidth=1.2, label=name, **LINES[name]) for name in lines]
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=len(handles),
        bbox_to_anchor=(0.0, 1.0),
        columnspacing=1.2,
        handletextpad=0.3,
        borderpad=0.2,
    )
