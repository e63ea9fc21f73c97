"""The exact optimum of a chain of groups with pairwise terms under one budget, by dynamic programming."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def chain_optimum(
    unary: npt.NDArray[np.float64],
    pairwise: npt.NDArray[np.float64],
    sizes: npt.NDArray[np.int64],
    capacity: int,
) -> tuple[npt.NDArray[np.int64], float]:
    """Minimize ``sum_g unary[g, c_g] + sum_g pairwise[g, c_g, c_(g+1)]`` with ``sum_g sizes[g, c_g] <= capacity``.

    ``best[c, b]`` is the least value of the groups so far when the last one takes choice c and all together at most
    b units (Bellman's recursion of the knapsack, with the last choice as part of the state). Time and memory grow
    with ``num_groups * num_choices * capacity``, time with ``num_choices`` once more.

    Args:
        unary: ``[num_groups, num_choices]``.
        pairwise: ``[num_groups - 1, num_choices, num_choices]``.
        sizes: units taken, ``[num_groups, num_choices]``.
        capacity: units available.

    Returns:
        Choice of every group, ``[num_groups]``, and the least value.

    Raises:
        ValueError: not even the smallest choices fit.
    """
    capacity = int(capacity - sizes.min(axis=1).sum())
    if capacity < 0:
        raise ValueError(f"The smallest choices need {-capacity} units more than there are.")
    extra = sizes - sizes.min(axis=1, keepdims=True)
    best = _shifted(np.zeros((unary.shape[1], capacity + 1)), extra[0]) + unary[0][:, None]
    origins = []
    for group in range(1, len(unary)):
        reached = best[:, None, :] + pairwise[group - 1][:, :, None]  # [previous choice, choice, units]
        origin = reached.argmin(axis=0)
        origins.append((origin, extra[group]))
        best = _shifted(np.take_along_axis(reached, origin[None], axis=0)[0], extra[group]) + unary[group][:, None]
    return _traced(best, origins), float(best[:, -1].min())


def _shifted(values: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Row c moved right by ``offsets[c]``; infinite where nothing fits."""
    result = np.full_like(values, np.inf)
    width = values.shape[1]
    for row, offset in enumerate(offsets.tolist()):
        if offset < width:
            result[row, offset:] = values[row, : width - offset]
    return result


def _traced(
    best: npt.NDArray[np.float64], origins: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
) -> npt.NDArray[np.int64]:
    """Choices of all groups, from the last back to the first."""
    choice, units = int(best[:, -1].argmin()), best.shape[1] - 1
    choices = [choice]
    for origin, extra in reversed(origins):
        units -= int(extra[choice])
        choice = int(origin[choice, units])
        choices.append(choice)
    return np.array(choices[::-1])
