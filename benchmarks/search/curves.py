"""Simple regret over cost: medians over seeds with bootstrap intervals, paired differences, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

from benchmarks.search.comparison import RegretCurve

Array = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
LEAST_SHOWN = 1e-4  # nats; the regret axis is logarithmic and zero has no place on it
NUM_COSTS = 121


@dataclass(frozen=True)
class Interval:
    """A median over seeds and its percentile bootstrap interval (Efron 1979), nats per token."""

    median: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """Ours minus a rival's regret over common seeds; below zero ours is better.

    Attributes:
        interval: of the median difference, nats per token.
        p_value: of Wilcoxon's signed-rank test, two-sided; 1 where all differences are zero.
        num_seeds: that both have run.
    """

    interval: Interval
    p_value: float
    num_seeds: int


def bootstrap_medians(values: Array, seed: int = 0) -> tuple[Array, Array, Array]:
    """Median, lower and upper bound over the first axis.

    Args:
        values: ``[num_seeds, ...]``.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    medians = np.median(values[picks], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail], axis=0, method="nearest")
    return np.median(values, axis=0), low, high


def median_interval(values: Array) -> Interval:
    """Of one number per seed."""
    return Interval(*(float(bound) for bound in bootstrap_medians(values)))


def select(curves: Sequence[RegretCurve], landscape: str, method: str) -> list[RegretCurve]:
    """One method's runs on one landscape, by seed."""
    chosen = [curve for curve in curves if (curve.job.landscape, curve.job.method) == (landscape, method)]
    return sorted(chosen, key=lambda curve: curve.job.seed)


def end_regrets(curves: Sequence[RegretCurve]) -> dict[int, float]:
    """Seed to regret at the end of the budget."""
    return {curve.job.seed: float(curve.at(np.array([curve.job.budget]))[0]) for curve in curves}


def paired_difference(ours: Sequence[RegretCurve], rival: Sequence[RegretCurve]) -> Difference | None:
    """At the end of the budget, over the seeds that both have; None where there is no such seed."""
    first, second = end_regrets(ours), end_regrets(rival)
    values = np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])
    if not len(values):
        return None
    p_value = float(wilcoxon(values).pvalue) if np.any(values) else 1.0
    return Difference(median_interval(values), p_value, len(values))


def names(curves: Sequence[RegretCurve]) -> tuple[list[str], list[str]]:
    """Landscapes and methods, in the order of their first appearance."""
    return list(dict.fromkeys(c.job.landscape for c in curves)), list(dict.fromkeys(c.job.method for c in curves))


def regret_table(curves: Sequence[RegretCurve]) -> str:
    """Markdown: median regret at the end of the budget and its interval, a row per method, a column per landscape."""
    landscapes, methods = names(curves)
    rows = [f"| method | {' | '.join(landscapes)} |", "|---" * (len(landscapes) + 1) + "|"]
    for method in methods:
        cells = [_regret_cell(select(curves, landscape, method)) for landscape in landscapes]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def difference_table(curves: Sequence[RegretCurve], ours: str) -> str:
    """Markdown: paired difference of ours and every rival; bold where the interval excludes zero."""
    landscapes, methods = names(curves)
    rows = [f"| {ours} minus | {' | '.join(landscapes)} |", "|---" * (len(landscapes) + 1) + "|"]
    for method in methods:
        if method != ours:
            pairs = [(select(curves, name, ours), select(curves, name, method)) for name in landscapes]
            cells = [_difference_cell(paired_difference(*pair)) for pair in pairs]
            rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _regret_cell(curves: Sequence[RegretCurve]) -> str:
    if not curves:
        return ""
    interval = median_interval(np.array(list(end_regrets(curves).values())))
    return f"{interval.median:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _difference_cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    interval = difference.interval
    text = f"{interval.median:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    return f"**{text}**" if interval.excludes_zero else text


def plot_regrets(curves: Sequence[RegretCurve], path: Path, ours: str) -> None:
    """One panel per landscape: medians over seeds, with bands of their intervals; ours in black."""
    landscapes, methods = names(curves)
    columns = min(3, len(landscapes))
    num_rows = -(-len(landscapes) // columns)
    figure, axes = plt.subplots(num_rows, columns, figsize=(5 * columns, 3.6 * num_rows), squeeze=False)
    colours = {method: f"C{index}" for index, method in enumerate(method for method in methods if method != ours)}
    colours[ours] = "black"
    for axis in axes.ravel()[len(landscapes) :]:
        axis.axis("off")
    for axis, landscape in zip(axes.ravel(), landscapes, strict=False):
        for method in methods:
            if runs := select(curves, landscape, method):
                _plot_method(axis, runs, colours[method])
        axis.set(title=landscape, yscale="log", xlabel="cost, evaluations at the highest level")
        axis.set_ylabel("simple regret, nats per token")
    handles = [plt.Line2D([], [], color=colours[method], label=method) for method in methods]
    figure.legend(handles=handles, loc="upper center", ncols=min(8, len(methods)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (3.6 * num_rows)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_method(axis: plt.Axes, runs: Sequence[RegretCurve], colour: str) -> None:
    costs = np.linspace(0, max(curve.job.budget for curve in runs), NUM_COSTS)
    values = np.stack([curve.at(costs) for curve in runs])
    begun = np.isfinite(values).all(axis=0)
    if begun.any():
        bounds = bootstrap_medians(values[:, begun])
        median, low, high = (np.maximum(bound, LEAST_SHOWN) for bound in bounds)
        axis.step(costs[begun], median, where="post", color=colour)
        axis.fill_between(costs[begun], low, high, step="post", color=colour, alpha=0.15, linewidth=0)
