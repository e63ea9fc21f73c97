"""How a search spends its budget over its stages and fidelities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

EVOLUTION_SHARE = 0.2  # of what is explored with, where there are cheap fidelities
PROMOTION_SHARE = 0.15  # of it, at each fidelity between the cheapest and the last
EVOLVED_TRIALS = 0.5  # of the trials that explore, at most, where their number is limited
PROMOTED_TRIALS = 0.25  # likewise, over all fidelities
MAX_EVOLVED = 400
NUM_WARM = 8
NUM_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What a search may ask for, in evaluations by stage; its costs never exceed the total.

    Attributes:
        level_costs: cost of one evaluation at every fidelity, cheapest first, in units of one full fine-tune.
        total_cost: limit of their sum.
        max_trials: limit of their number; None for none.
        num_warm: plans that need no search, at the cheapest fidelity.
        num_evolved: by the evolution, at the cheapest fidelity.
        num_promoted: at the fidelities above it but the last, and how many of these climb on to the last.
        num_explored: by the trust region, at the last fidelity.
        num_finalists: searched plans that are confirmed beside the baselines.
        num_seeds: training seeds that finalists are confirmed with.
        num_variants: learning rates that finalists are tried with.
        num_baselines: plans that are evaluated at the last fidelity whatever the stages find; they are finalists.
        trains_surrogate: a surrogate may decide who climbs; otherwise the cheap loss does.
    """

    level_costs: tuple[float, ...]
    total_cost: float
    max_trials: int | None = None
    num_warm: int = NUM_WARM
    num_evolved: int = 0
    num_promoted: tuple[int, ...] = ()
    num_explored: int = 0
    num_finalists: int = 2
    num_seeds: int = NUM_SEEDS
    num_variants: int = 1
    num_baselines: int = 2
    trains_surrogate: bool = True

    @property
    def confirmation(self) -> tuple[float, int]:
        """Cost and evaluations that are set aside for the finalists' further seeds and learning rates."""
        extra = 2 * (self.num_seeds - 1) + (self.num_finalists + self.num_baselines) * (self.num_variants - 1)
        num = min(extra, int(0.5 * self.total_cost / self.level_costs[-1]))
        return num * self.level_costs[-1], num

    def num_at(self, level: int) -> int:
        """Evaluations at a fidelity if all its stages use up what they may."""
        num = self._num_at(level)
        return num if self.max_trials is None else min(num, self.max_trials)

    def _num_at(self, level: int) -> int:
        top = len(self.level_costs) - 1
        if level == top:
            return int(self.total_cost / self.level_costs[top]) if top == 0 else self._num_top()
        return 1 + (self.num_promoted[level - 1] if level else self.num_warm + self.num_evolved)

    def _num_top(self) -> int:
        below = sum(self.num_at(level) * cost for level, cost in enumerate(self.level_costs[:-1]))
        return max(0, int((self.total_cost - below) / self.level_costs[-1]))

    def without(self, *stages: str) -> Spending:
        """The same budget with some stages left out; what they would have cost goes to the trust region.

        Args:
            stages: ``"warm"``, ``"evolution"``, ``"fidelities"``, ``"surrogate"`` or ``"trust_region"``.
        """
        if "fidelities" in stages:
            only = plan_spending(
                self.level_costs[-1:],
                self.total_cost,
                max_trials=self.max_trials,
                num_baselines=self.num_baselines,
                num_seeds=self.num_seeds,
                num_variants=self.num_variants,
            )
            return only.without(*(stage for stage in stages if stage != "fidelities"))
        changed = self
        if "warm" in stages:
            changed = replace(changed, num_warm=0)
        if "evolution" in stages:
            changed = replace(changed, num_evolved=0)
        if "surrogate" in stages:
            changed = replace(changed, trains_surrogate=False)
        return replace(changed, num_explored=0) if "trust_region" in stages else changed


def plan_spending(
    level_costs: Sequence[float],
    total_cost: float,
    *,
    max_trials: int | None = None,
    num_baselines: int = 2,
    num_seeds: int = NUM_SEEDS,
    num_variants: int = 1,
) -> Spending:
    """Divide a budget: confirmation and baselines first, since they make the answer; the rest explores.

    Args:
        level_costs: cost of one evaluation at every fidelity, cheapest first, in any unit.
        total_cost: in the same unit.
        max_trials: evaluations at most.
        num_baselines: plans that are evaluated at the last fidelity whatever the stages find.
        num_seeds: of the confirmation.
        num_variants: learning rates of the confirmation.

    Raises:
        ValueError: costs that are not positive and ascending.
    """
    costs = tuple(level_costs)
    if not costs or costs[0] <= 0 or list(costs) != sorted(costs):
        raise ValueError(f"level_costs={costs} must be positive and ascending.")
    plan = Spending(
        level_costs=costs,
        total_cost=total_cost,
        max_trials=max_trials,
        num_seeds=num_seeds,
        num_variants=num_variants,
        num_baselines=num_baselines,
        num_finalists=2 if num_seeds * costs[-1] * 4 < total_cost else 1,
    )
    compared = sum(costs[:-1])  # of the allocation, at the cheaper fidelities
    explored = max(0.0, total_cost - plan.confirmation[0] - num_baselines * costs[-1] - compared)
    trials = math.inf
    if max_trials is not None:
        trials = max(0, max_trials - plan.confirmation[1] - num_baselines - len(costs) + 1)
    if len(costs) == 1:
        num = int(min(explored / costs[0], trials))
        num_warm = min(NUM_WARM, num // 3)
        num_evolved = min(MAX_EVOLVED, int(EVOLUTION_SHARE * (num - num_warm)))
        return replace(plan, num_warm=num_warm, num_evolved=num_evolved, num_explored=num)
    cheap = min(EVOLUTION_SHARE * explored / costs[0], EVOLVED_TRIALS * trials)
    num_warm = min(NUM_WARM, int(cheap / 2))
    most = PROMOTED_TRIALS * trials / len(costs[1:])
    num_promoted = tuple(int(min(PROMOTION_SHARE * explored / cost, most)) for cost in costs[1:])
    return replace(
        plan,
        num_warm=num_warm,
        num_evolved=min(MAX_EVOLVED, int(cheap) - num_warm),
        num_promoted=num_promoted,
        num_explored=int(min(explored / costs[-1], trials)),
    )
