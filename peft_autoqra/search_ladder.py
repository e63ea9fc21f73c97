"""The fidelities of a search, chosen so that its trials fit into what it may cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft_autoqra.errors import SearchBudgetError
from peft_autoqra.search.ledger import Request
from peft_autoqra.search.spending import Spending, plan_spending
from peft_autoqra.search_config import SearchArguments
from peft_autoqra.search_costs import SearchCosts
from peft_autoqra.trial import Fidelity

NUM_TOP_TRIALS = 24  # at the last fidelity, if all were spent there
MIN_TOP_STEPS = 8
MIN_EVAL_SEQUENCES = 8
SCORING_SHARE = 0.4  # of a trial at the last fidelity, at most
CHEAP_SHARE = 0.4  # a cheaper fidelity has to cost less than this share of the next one
GROWTH = 3  # of the steps from one trained fidelity to the next (Hyperband's eta, Li et al. 2018)
MIN_STEPS = 4


@dataclass(frozen=True)
class Ladder:
    """Fidelities of a search and what it spends on each.

    Attributes:
        fidelities: cheapest first, at the first seed.
        spending: trials by stage.
        calibration_cost: in units of one full fine-tune.
        learning_rate_factors: of the variants.
        seed: of the first training run; further seeds count on from it.
    """

    fidelities: tuple[Fidelity, ...]
    spending: Spending
    calibration_cost: float
    learning_rate_factors: tuple[float, ...]
    seed: int

    @property
    def final(self) -> Fidelity:
        """The fidelity that decides."""
        return self.fidelities[-1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "calibration_cost": self.calibration_cost,
            "fidelities": [asdict(fidelity) for fidelity in self.fidelities],
            "stages": asdict(self.spending),
        }

    def fidelity(self, request: Request) -> Fidelity:
        """How a request is evaluated."""
        return replace(
            self.fidelities[request.level],
            seed=self.seed + request.seed,
            learning_rate_factor=self.learning_rate_factors[request.variant],
        )


def build_ladder(config: SearchArguments, costs: SearchCosts, *, seed: int, num_baselines: int) -> Ladder:
    """Choose fidelities and divide the budget.

    The last fidelity is as long as lets some ``NUM_TOP_TRIALS`` trials of it fit, but long enough to train. Below it
    lie runs of a third of its steps, and the score without training.

    Args:
        config: ``max_cost``, ``max_trials``, ``num_eval_sequences``, ``num_seeds``, ``learning_rate_factors``.
        costs: of trials.
        seed: of the first training run.
        num_baselines: plans that are evaluated at the last fidelity whatever the stages find.

    Raises:
        SearchBudgetError: not even the baselines can be tried.
    """
    available = config.max_cost - costs.calibration
    num_eval, num_steps = _top(config, costs, available)
    top = Fidelity(num_steps, num_eval, seed)
    least = (num_baselines + 1) * costs.trial(top)
    if available < least:
        enough = _rounded_up(costs.calibration + least)
        lengthened = (num_baselines + 1) * (MIN_TOP_STEPS - num_steps)  # a longer fine-tune has longer comparisons
        longer = math.ceil((costs.full_steps * enough + lengthened) / config.max_cost)
        raise SearchBudgetError(
            f"max_cost={config.max_cost:g} full fine-tunes ({costs.full_steps:,} steps each) is too little to search "
            f"with: calibration takes {costs.calibration:.3g} and the shortest comparison {least:.3g}. Raise max_cost "
            f"to at least {enough:.3g}, fine-tune for at least {longer:,} steps, or use fewer "
            "num_calibration_sequences. Without a search, uniform bits and ranks can be calibrated: autoqra train "
            "--bits 4 --r 16."
        )
    fidelities = [top]
    middle = Fidelity(num_steps // GROWTH, num_eval, seed)
    untrained = Fidelity(0, num_eval, seed)
    for cheaper in (middle, untrained):
        is_worth = costs.trial(cheaper) <= CHEAP_SHARE * costs.trial(fidelities[0])
        if is_worth and (cheaper.num_steps == 0 or cheaper.num_steps >= MIN_STEPS):
            fidelities.insert(0, cheaper)
    spending = plan_spending(
        [costs.trial(fidelity) for fidelity in fidelities],
        available,
        max_trials=config.max_trials,
        num_baselines=num_baselines,
        num_seeds=config.num_seeds,
        num_variants=len(config.learning_rate_factors),
    )
    return Ladder(tuple(fidelities), spending, costs.calibration, tuple(config.learning_rate_factors), seed)


def _rounded_up(cost: float) -> float:
    """To three significant digits, so that what a message names suffices."""
    unit = 10.0 ** (math.floor(math.log10(cost)) - 2)
    return math.ceil(cost / unit + 1e-6) * unit


def _top(config: SearchArguments, costs: SearchCosts, available: float) -> tuple[int, int]:
    """Held-out sequences and steps of the last fidelity."""
    share = max(available, 0.0) / NUM_TOP_TRIALS
    least = costs.steps(MIN_TOP_STEPS)
    wanted = SCORING_SHARE * max(share, least) / costs.scoring(1)
    num_eval = min(config.num_eval_sequences, max(MIN_EVAL_SEQUENCES, int(wanted)))
    num_steps = int((share - costs.scoring(num_eval)) * costs.full_steps)
    return num_eval, min(max(num_steps, MIN_TOP_STEPS), costs.full_steps)
