"""Cells compared run by run: the same seeds, the same held-out examples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from benchmarks.finetune.cell_runs import CellRuns
from benchmarks.finetune.records import Split
from peft_autoqra.paired import paired_difference

FloatArray = NDArray[np.float64]
UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A figure with its 95% interval.

    Attributes:
        value: median over seeds.
        interval: of the mean over seeds and held-out examples; infinite where it is unknown. With one seed it is about
            other examples and not about other seeds.
        num_seeds: that all compared cells were run with.
        num_examples: held-out.
    """

    value: float
    interval: tuple[float, float]
    num_seeds: int
    num_examples: int


def loss_difference(first: CellRuns, second: CellRuns) -> Effect | None:
    """Held-out loss of the first minus the second's; None without a common seed."""
    values = _values(_losses, first, second)
    return None if values is None else _difference(*values)


def metric_difference(first: CellRuns, second: CellRuns) -> Effect | None:
    """Share of right answers of the first minus the second's; None without a common seed, or a metric."""
    values = _values(_right, first, second)
    return None if values is None or not values[0].size else _difference(*values)


def gap_closed(runs: CellRuns, lower: CellRuns, upper: CellRuns) -> Effect | None:
    """``(L(lower) - L(runs)) / (L(lower) - L(upper))``: the share of the gap in loss that is closed.

    The interval is Fieller's (Some problems in interval estimation, 1954): those shares with which
    ``(L(lower) - L(runs)) - share * (L(lower) - L(upper))`` is not distinguished from zero by
    :func:`~peft_autoqra.paired.paired_difference`. It is unbounded where the gap itself is not
    distinguished from zero.

    Args:
        runs: the cell that is asked about.
        lower: where the gap begins: share 0.
        upper: where it ends: share 1.

    Returns:
        None without a common seed, or where a seed shows no gap.
    """
    values = _values(_losses, runs, lower, upper)
    if values is None:
        return None
    own, low, high = values
    gained, gap = low - own, low - high
    if gap.mean(axis=1).min() <= 0:
        return None
    shares = gained.mean(axis=1) / gap.mean(axis=1)
    return Effect(
        value=statistics.median(shares.tolist()),
        interval=_ratio_interval(gained, gap),
        num_seeds=own.shape[0],
        num_examples=own.shape[1],
    )


def loss_above_mark(runs: CellRuns, lower: CellRuns, upper: CellRuns, *, share: float) -> Effect | None:
    """Loss above the point where a share of the gap is closed; below 0 where more of it is closed.

    It excludes zero where Fieller's interval of :func:`gap_closed` excludes the share, and needs no division: it says
    something where the gap is small, too.
    """
    values = _values(_losses, runs, lower, upper)
    if values is None:
        return None
    own, low, high = values
    return _difference(own, low - share * (low - high))


def median_loss(runs: CellRuns) -> float:
    """On the test split, over seeds."""
    return statistics.median(record.test.loss for record in runs.records if record.test is not None)


def median_answer_loss(runs: CellRuns) -> float:
    """Over tokens of completions alone, on the test split, over seeds."""
    return statistics.median(record.test.answer_loss for record in runs.records if record.test is not None)


def median_metric(runs: CellRuns) -> float | None:
    """Share of right answers on the test split, median over seeds; None where there is no metric."""
    tests = [record.test for record in runs.records if record.test is not None]
    values = [test.metric for test in tests if test.metric is not None]
    return statistics.median(values) if values else None


def _values(of: Callable[[Split], list[float]], *cells: CellRuns) -> list[FloatArray] | None:
    """``[num_seeds, num_examples]`` of each cell, seeds that all have; None without any."""
    seeds = sorted(set.intersection(*(set(cell.runs) for cell in cells)))
    tests = [[cell.runs[seed].test for seed in seeds] for cell in cells]
    return [np.array([of(test) for test in row if test is not None]) for row in tests] if seeds else None


def _losses(split: Split) -> list[float]:
    return list(split.losses)


def _right(split: Split) -> list[float]:
    return [float(answer) for answer in split.right]


def _difference(first: FloatArray, second: FloatArray) -> Effect:
    return Effect(
        value=statistics.median((first - second).mean(axis=1).tolist()),
        interval=paired_difference(first.tolist(), second.tolist()).interval,
        num_seeds=first.shape[0],
        num_examples=first.shape[1],
    )


def _ratio_interval(numerator: FloatArray, denominator: FloatArray) -> tuple[float, float]:
    """Of the ratio of the means, for ``[num_seeds, num_examples]`` and a denominator with a mean above 0."""

    def excess(share: float) -> float:
        """Above 0 where the share is outside of the interval."""
        low, high = paired_difference(numerator.tolist(), (share * denominator).tolist()).interval
        return max(low, -high)

    if paired_difference(denominator.tolist(), np.zeros_like(denominator).tolist()).interval[0] <= 0:
        return UNBOUNDED
    centre = float(numerator.mean() / denominator.mean())
    if excess(centre) >= 0:  # all seeds and examples agree
        return centre, centre
    return _crossing(excess, centre, -1.0), _crossing(excess, centre, 1.0)


def _crossing(excess: Callable[[float], float], centre: float, direction: float) -> float:
    """Where a function that is negative at the centre and positive far from it crosses zero."""
    step = 0.1
    while excess(centre + direction * step) < 0:
        step *= 2
    return float(brentq(excess, centre, centre + direction * step))
