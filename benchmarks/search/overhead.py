"""How long the search itself takes, besides evaluations."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from peft_autoqra.search.engine import SearchEngine
from peft_autoqra.search.ledger import Outcome
from peft_autoqra.search.spending import plan_spending
from tests.search.synthetic import InteractingTruth, make_problem

KINDS_PER_LAYER = 7
LEVEL_COSTS = (0.1, 0.35, 1.0)


@dataclass(frozen=True)
class Overhead:
    """Time of a search without its evaluations.

    Attributes:
        num_groups: of the problem.
        num_trials: that were asked for.
        total_seconds: of all asks and tells, and of setting the engine up.
        median_ask_seconds: of one ask.
        largest_ask_seconds: likewise.
        median_top_ask_seconds: of an ask that ended in a trial at the last fidelity.
    """

    num_groups: int
    num_trials: int
    total_seconds: float
    median_ask_seconds: float
    largest_ask_seconds: float
    median_top_ask_seconds: float


def measure_overhead(num_layers: int, num_trials: int, seed: int = 0) -> Overhead:
    """Run a search of so many trials on a synthetic problem whose evaluations take no time."""
    problem = make_problem(num_layers * KINDS_PER_LAYER, seed, budget_fraction=0.4)
    truth = InteractingTruth(problem, seed)
    start = time.perf_counter()
    spending = plan_spending(LEVEL_COSTS, num_trials / 4, max_trials=num_trials)
    engine = SearchEngine(problem, spending, seed=seed)
    asks, top_asks, evaluating = [], [], 0.0
    while True:
        asked = time.perf_counter()
        requests = engine.ask()
        asks.append(time.perf_counter() - asked)
        if not requests:
            break
        request = requests[0]
        if request.level == engine.ledger.top:
            top_asks.append(asks[-1])
        evaluated = time.perf_counter()
        loss = truth(request.arm)
        evaluating += time.perf_counter() - evaluated
        engine.tell(request, Outcome(loss))
    total = time.perf_counter() - start - evaluating
    medians = float(np.median(asks)), float(np.median(top_asks))
    return Overhead(problem.space.num_groups, engine.ledger.num_asked, total, medians[0], max(asks), medians[1])
