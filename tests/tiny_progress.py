"""Trials and progress of a search that was never run."""

from __future__ import annotations

from typing import Any

from peft_autoqra import BitRankPlan, LayerPlan
from peft_autoqra.search_callback import SearchProgress
from peft_autoqra.trial import Fidelity, Trial, TrialResult, TrialStatus

PLAN = BitRankPlan(
    {"layers.0.up": LayerPlan(2, 8), "layers.0.down": LayerPlan(4, 4)},
    shapes={"layers.0.up": (32, 16), "layers.0.down": (16, 32)},
)


def make_trial(number: int, loss: float | None, *, steps: int = 8, seconds: float = 10.0, **changes: Any) -> Trial:
    """A trial that has ended; one of 8 steps costs 0.1, others in proportion."""
    status = TrialStatus.FAILED if loss is None else TrialStatus.COMPLETED
    settings = {"origin": "evolution", "fidelity": Fidelity(steps, 8), "cost": steps / 80} | changes
    result = TrialResult(status=status, seconds=seconds, loss=loss, error="boom" if loss is None else None)
    return Trial(number=number, plan=PLAN, total_bytes=1000, result=result, **settings)


def make_progress(*trials: Trial, num_running: int = 0, **changes: Any) -> SearchProgress:
    """Progress where calibration cost 0.2, pending trials 0.1 each, and the limit is 2 fine-tunes."""
    pending_cost = 0.1 * num_running
    last = [trial for trial in trials if trial.loss is not None and trial.fidelity.num_steps == 8]
    settings = {
        "cost": 0.2 + sum(trial.cost for trial in trials) + pending_cost,
        "max_cost": 2.0,
        "max_trials": None,
        "seconds": 30.0 + sum(trial.result.seconds for trial in trials),
        "max_seconds": None,
        "best": min(last, key=lambda trial: trial.loss, default=None),
        "best_baseline": next((trial for trial in last if trial.origin == "baseline"), None),
    }
    return SearchProgress(trials=trials, num_running=num_running, pending_cost=pending_cost, **settings | changes)
