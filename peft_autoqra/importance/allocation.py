"""Exact allocation: the candidate with the least additive loss within a budget (multiple-choice knapsack)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from peft_autoqra.errors import AutoQRAError, UnreachableBudgetError
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

RELATIVE_GAP = 1e-6
TIME_LIMIT_SECONDS = 60.0
COST_SCALE = 1e4  # HiGHS stops at an absolute gap of 1e-6 too, so costs must be large beside that
BYTES_SCALE = 1e4


class AllocationError(AutoQRAError, RuntimeError):
    """The knapsack was not solved, for example within its time limit."""


@dataclass(frozen=True)
class _Options:
    """The choices worth considering: one entry per (group, choice) that no other choice of its group dominates.

    Attributes:
        group: index of the group, ``[num_options]``.
        bit: position on the bit ladder, ``[num_options]``.
        rank: position on the rank ladder, ``[num_options]``.
        cost: loss above the group's best, nats, ``[num_options]``.
        size: bytes above the group's smallest choice, in units of ``unit_bytes``, ``[num_options]``, int64.
        unit_bytes: greatest common divisor of all sizes.
    """

    group: npt.NDArray[np.int64]
    bit: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    cost: npt.NDArray[np.float64]
    size: npt.NDArray[np.int64]
    unit_bytes: int

    def where(self, kept: npt.NDArray[np.bool_]) -> _Options:
        """A part of the options."""
        columns = (self.group[kept], self.bit[kept], self.rank[kept], self.cost[kept], self.size[kept])
        return _Options(*columns, self.unit_bytes)


def allocate(problem: SearchProblem, budget_bytes: int | None = None) -> Candidate:
    """The feasible candidate with the least predicted loss, exact to a relative gap of 1e-6.

    Minimizes ``sum_g loss[g, c_g]`` subject to ``sum_g bytes[g, c_g] <= budget``, one binary variable per choice that
    no other choice of its group dominates (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11). Of
    choices with equal loss and bytes the one lowest on the ladders is kept, and HiGHS runs with a fixed seed, so the
    same problem gives the same candidate.

    Args:
        problem: tables and budget.
        budget_bytes: limit of the total bytes; the problem's own by default.

    Raises:
        UnreachableBudgetError: the budget is below the smallest candidate.
        AllocationError: not solved within the time limit.
    """
    budget = problem.budget_bytes if budget_bytes is None else budget_bytes
    if budget < problem.smallest_bytes:
        raise UnreachableBudgetError(
            f"A budget of {budget:,} bytes cannot be reached: the smallest plan of this search space takes "
            f"{problem.smallest_bytes:,} bytes. Raise the budget or allow fewer bits or smaller ranks."
        )
    options = _undominated_options(problem)
    slack = (budget - problem.smallest_bytes) // options.unit_bytes
    core = _core(options, slack)
    return _as_candidate(core, _solve(core, slack))


def pareto_allocations(problem: SearchProblem, budgets: Sequence[int]) -> list[Candidate]:
    """The exact allocation of every budget (total bytes), in the order given.

    Raises:
        UnreachableBudgetError: a budget is below the smallest candidate.
        AllocationError: one was not solved within the time limit.
    """
    return [allocate(problem, budget) for budget in budgets]


def _undominated_options(problem: SearchProblem) -> _Options:
    """Per group: sorted by bytes, each choice that lowers the loss below that of all smaller ones."""
    allowed = problem.space.allowed_choices()
    rows: list[tuple[int, int, int, float, int]] = []
    for group in range(problem.space.num_groups):
        bits, ranks = np.nonzero(allowed[group])
        sizes, losses = problem.bytes_table[group, bits, ranks], problem.loss_table[group, bits, ranks]
        best = math.inf
        for index in np.lexsort((ranks, bits, losses, sizes)):
            if losses[index] < best:
                best = losses[index]
                extra_bytes = int(sizes[index] - sizes.min())
                rows.append((group, int(bits[index]), int(ranks[index]), losses[index] - losses.min(), extra_bytes))
    group_column, bit_column, rank_column, costs, extra = map(np.asarray, zip(*rows, strict=True))
    unit_bytes = int(np.gcd.reduce(extra)) or 1
    return _Options(group_column, bit_column, rank_column, costs, extra // unit_bytes, unit_bytes)


def _core(options: _Options, slack: int) -> _Options:
    """The options that some optimal solution may need: those that fit and that reduced-cost fixing leaves.

    With the Lagrange multiplier of the budget, an option whose reduced cost is above the gap between a feasible
    solution and the Lagrangian bound is in no optimal solution. Some three options per group are left of fifteen.
    """
    options = options.where(options.size <= slack)
    multiplier = _budget_multiplier(options, slack)
    starts = np.flatnonzero(np.diff(options.group, prepend=-1))
    priced = options.cost + multiplier * options.size
    best = np.minimum.reduceat(priced, starts)
    bound = float(best.sum()) - multiplier * slack
    gap = float(options.cost[_greedy(options, multiplier, slack)].sum()) - bound
    kept = priced - best[options.group] <= gap * (1 + 1e-9) + 1e-12 * float(best.sum() + options.cost.max())
    return options.where(kept)


def _picks(options: _Options, multiplier: float) -> npt.NDArray[np.int64]:
    """The option of every group with the least ``cost + multiplier * size``, ``[num_groups]``."""
    order = np.lexsort((options.size, options.cost + multiplier * options.size, options.group))
    return np.asarray(order[np.diff(options.group[order], prepend=-1) != 0])


def _budget_multiplier(options: _Options, slack: int) -> float:
    """Least nats per unit of bytes at which the picks keep the budget, to float precision; 0 where that is free."""
    low, high = 0.0, float(options.cost.max()) + 1e-300
    if options.size[_picks(options, low)].sum() <= slack:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        fits = options.size[_picks(options, middle)].sum() <= slack
        low, high = (low, middle) if fits else (middle, high)
    return high


def _greedy(options: _Options, multiplier: float, slack: int) -> npt.NDArray[np.int64]:
    """A feasible solution: the picks, then the single changes that lower the cost most while they fit."""
    picks = _picks(options, multiplier)
    while True:
        gain = options.cost[picks][options.group] - options.cost
        growth = options.size - options.size[picks][options.group]
        gain[growth > slack - options.size[picks].sum()] = 0.0
        best = int(gain.argmax())
        if gain[best] <= 0:
            return picks
        picks[options.group[best]] = best


def _solve(options: _Options, slack: int) -> npt.NDArray[np.bool_]:
    """Which options to take, ``[num_options]``; their sizes sum to at most ``slack``, by integer arithmetic.

    HiGHS keeps rows and integrality to about 1e-6 of their scale, which may be some bytes. A solution above the
    budget by that much is refused and the row tightened by the excess.
    """
    limit = slack
    while True:
        chosen = _solve_relaxed_row(options, limit)
        excess = int(options.size[chosen].sum()) - slack
        if excess <= 0:
            return chosen
        limit -= excess


def _solve_relaxed_row(options: _Options, limit: int) -> npt.NDArray[np.bool_]:
    num_options = len(options.group)
    one_each = csr_array((np.ones(num_options), (options.group, np.arange(num_options))))
    row_scale = max(1.0, float(options.size.max()) / BYTES_SCALE)
    sizes = csr_array(options.size[None, :] / row_scale)
    result: OptimizeResult = milp(
        options.cost * (COST_SCALE / (options.cost.max() or 1.0)),
        integrality=np.ones(num_options),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, -np.inf, limit / row_scale)],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": TIME_LIMIT_SECONDS},
    )
    if result.status != 0:
        raise AllocationError(
            f"The allocation of {options.group.max() + 1} groups was not solved within {TIME_LIMIT_SECONDS:.0f} s "
            f"({result.message}). Use a coarser granularity or fewer bit and rank choices."
        )
    return np.asarray(result.x > 0.5)


def _as_candidate(options: _Options, chosen: npt.NDArray[np.bool_]) -> Candidate:
    return tuple(zip(options.bit[chosen].tolist(), options.rank[chosen].tolist(), strict=True))
