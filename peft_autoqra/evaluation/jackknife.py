"""Figures of a whole data set as means over its examples, so that models can be compared example by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MAX_GROUPS = 200  # beyond it neighbouring examples are left out together


def example_values(statistic: Callable[[Sequence[int]], float], num_examples: int) -> tuple[float, ...]:
    """Values whose mean is the statistic of all examples, and whose spread tells its standard error.

    Tukey's pseudo-values, ``n * theta - (n - 1) * theta_without_i`` (Tukey 1958; Miller, The jackknife: a review,
    Biometrika 61, 1974), moved by a constant so that their mean is ``theta`` rather than its bias-corrected form. Of a
    mean over the examples they are the examples' own values. With more than ``MAX_GROUPS`` examples, groups of them
    are left out together (the same article, section 2), and there is one value for each group.

    Args:
        statistic: of the examples with the given positions, finite.
        num_examples: positions to choose from.

    Raises:
        ArithmeticError: the statistic is not finite.
    """
    everything = list(range(num_examples))
    whole = _finite(statistic(everything))
    if num_examples == 1:
        return (whole,)
    groups = np.array_split(np.arange(num_examples), min(num_examples, MAX_GROUPS))
    left_out = [
        _finite(statistic([*everything[: group[0]], *everything[group[-1] + 1 :]])) for group in map(list, groups)
    ]
    pseudo_values = len(groups) * whole - (len(groups) - 1) * np.asarray(left_out)
    return tuple((pseudo_values - pseudo_values.mean() + whole).tolist())


def _finite(value: float) -> float:
    if not np.isfinite(value):
        raise ArithmeticError(f"the metric is {value}")
    return float(value)
