"""What a search asked for, what came out, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peft_autoqra.paired import PairedDifference, paired_difference
from peft_autoqra.search_space import Candidate

Arm = Candidate | str
"""What can be evaluated: a candidate of the space, or a plan from outside of it by its name."""


@dataclass(frozen=True)
class Request:
    """One evaluation that the search asks for.

    Attributes:
        arm: what.
        level: fidelity, 0 is the cheapest.
        origin: who proposed it.
        seed: training seed, counted from 0.
        variant: learning rate, counted from 0; 0 is the recipe's.
    """

    arm: Arm
    level: int
    origin: str
    seed: int = 0
    variant: int = 0


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave.

    Attributes:
        loss: nats per token; None where it failed.
        sequence_losses: loss of every held-out sequence, in the same order at every evaluation.
    """

    loss: float | None
    sequence_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Key:
    arm: Arm
    level: int
    seed: int
    variant: int


class Ledger:
    """Outcomes by arm, fidelity and seed, and the budget of the search.

    Args:
        level_costs: cost of one evaluation at every fidelity, cheapest first.
        total_cost: that may be spent, in the same unit.
        max_trials: evaluations at most; None for any number.
    """

    def __init__(self, level_costs: Sequence[float], total_cost: float, max_trials: int | None = None) -> None:
        """Nothing is spent yet."""
        self.level_costs, self.total_cost, self.max_trials = tuple(level_costs), total_cost, max_trials
        self.spent = 0.0
        self._outcomes: dict[_Key, Outcome] = {}
        self._asked: dict[_Key, None] = {}

    @property
    def top(self) -> int:
        """The most expensive fidelity."""
        return len(self.level_costs) - 1

    @property
    def num_asked(self) -> int:
        """Evaluations asked for."""
        return len(self._asked)

    def affords(self, level: int, reserve: tuple[float, int] = (0.0, 0)) -> bool:
        """Whether one more evaluation is within the budget, less a reserve of cost and of evaluations."""
        within = self.spent + self.level_costs[level] + reserve[0] <= self.total_cost * (1 + 1e-9)
        return within and (self.max_trials is None or self.num_asked + reserve[1] < self.max_trials)

    def num_affordable(self, level: int) -> int:
        """Further evaluations at a fidelity that are within the budget, if all of it is spent there."""
        num = int((self.total_cost * (1 + 1e-9) - self.spent) / self.level_costs[level])
        return num if self.max_trials is None else min(num, self.max_trials - self.num_asked)

    def book(self, request: Request) -> None:
        """Spend the cost of a request that is handed out."""
        self._asked[_key(request)] = None
        self.spent += self.level_costs[request.level]

    def was_asked(self, request: Request) -> bool:
        """Whether the same evaluation was handed out before."""
        return _key(request) in self._asked

    def record(self, request: Request, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._outcomes[_key(request)] = outcome

    def outcome(self, arm: Arm, level: int, seed: int = 0, variant: int = 0) -> Outcome | None:
        """The outcome of one evaluation; None where there is none yet."""
        return self._outcomes.get(_Key(arm, level, seed, variant))

    def loss(self, arm: Arm, level: int, variant: int = 0, num_seeds: int | None = None) -> float:
        """Mean loss over the seeds that were run, nats per token; infinite where one failed or none was run.

        Args:
            arm: whose.
            level: fidelity.
            variant: learning rate.
            num_seeds: take the first so many seeds only.
        """
        losses = [self._outcomes[key].loss for key in self._keys(arm, level, variant)[:num_seeds]]
        usable = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        return sum(usable) / len(usable) if usable and len(usable) == len(losses) else math.inf

    def candidates(self, level: int) -> list[Candidate]:
        """Candidates of the space with an outcome at a fidelity, failed ones too, in the order of their arrival."""
        found = [key.arm for key in self._outcomes if key.level == level and not isinstance(key.arm, str)]
        return list(dict.fromkeys(found))

    def arms(self, level: int) -> list[Arm]:
        """All arms that did not fail at a fidelity, in the order of their arrival."""
        found = dict.fromkeys(key.arm for key in self._outcomes if key.level == level)
        return [arm for arm in found if math.isfinite(self.loss(arm, level))]

    def num_seeds(self, arm: Arm, level: int, variant: int = 0) -> int:
        """Training seeds that an arm was run with."""
        return len(self._keys(arm, level, variant))

    def best_variant(self, arm: Arm, level: int, num_variants: int) -> int:
        """The learning rate with the least loss at the first seed."""
        losses = [self._seed_loss(arm, level, variant) for variant in range(num_variants)]
        return min(range(num_variants), key=losses.__getitem__)

    def difference(
        self, first: Arm, second: Arm, level: int, variants: tuple[int, int] = (0, 0)
    ) -> PairedDifference | None:
        """Paired difference over the seeds that both were run with; None where none was, or one failed.

        Outcomes without sequences, or with other ones, count as exact.
        """
        rows: tuple[list[Sequence[float]], list[Sequence[float]]] = ([], [])
        seeds = {key.seed for key in self._keys(first, level, variants[0])}
        for seed in sorted(seeds & {key.seed for key in self._keys(second, level, variants[1])}):
            outcomes = (
                self._outcomes[_Key(first, level, seed, variants[0])],
                self._outcomes[_Key(second, level, seed, variants[1])],
            )
            if any(outcome.loss is None or not math.isfinite(outcome.loss) for outcome in outcomes):
                return None
            counts = {len(outcome.sequence_losses) for outcome in outcomes}
            is_paired = len(counts) == 1 and counts != {0}
            for row, outcome in zip(rows, outcomes, strict=True):
                row.append(outcome.sequence_losses if is_paired else (outcome.loss or 0.0,))
        if not rows[0]:
            return None
        if len({len(row) for row in rows[0]}) > 1 or len(rows[0][0]) == 1:  # of some seeds only the mean is known
            means = [[sum(row) / len(row) for row in side] for side in rows]
            return paired_difference(*([(mean, mean) for mean in side] for side in means))
        return paired_difference(*rows)

    def _seed_loss(self, arm: Arm, level: int, variant: int) -> float:
        outcome = self.outcome(arm, level, 0, variant)
        return outcome.loss if outcome is not None and outcome.loss is not None else math.inf

    def _keys(self, arm: Arm, level: int, variant: int) -> list[_Key]:
        keys, seed = [], 0
        while (key := _Key(arm, level, seed, variant)) in self._outcomes:
            keys.append(key)
            seed += 1
        return keys


def _key(request: Request) -> _Key:
    return _Key(request.arm, request.level, request.seed, request.variant)
