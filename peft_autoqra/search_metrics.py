"""What trackers are told of a search.

transformers' integrations write what begins with ``eval_`` as ``eval/``, everything else as ``train/``. Figures of
another objective than the held-out loss go by its name, and as it has them: more may be better.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.search_result import SearchResult
from peft_autoqra.trial import Trial

Metrics = dict[str, float | str]


def trial_metrics(
    told: Sequence[Trial], *, calibration_cost: float, seed: int, objective: ObjectiveInfo = HELD_OUT_LOSS
) -> Metrics:
    """Figures of the last of the trials that have ended, and of the search at its end.

    Args:
        told: trials in the order of telling; the last fidelity is the one with the most steps, since the baselines,
            which are told first, are run at it.
        calibration_cost: in units of one full fine-tune.
        seed: of the first training run.
        objective: what the losses are of.
    """
    trial = told[-1]
    metrics: Metrics = {
        "cost": calibration_cost + sum(one.cost for one in told),
        "trial_cost": trial.cost,
        "total_bytes": trial.total_bytes,
        "average_bits": trial.plan.average_bits,
        "average_rank": trial.plan.average_rank,
        "num_steps": trial.fidelity.num_steps,
        "num_failed": sum(one.loss is None for one in told),
    }
    if trial.result is not None:
        metrics["seconds"] = trial.result.seconds
        metrics |= {f"eval_{_word(name)}": value for name, value in trial.result.metrics.items()}
    if trial.loss is not None:
        key, figure = _key(objective), objective.figure(trial.loss)
        metrics |= {f"eval_{key}": figure, f"eval_{key}_after_{trial.fidelity.num_steps}_steps": figure}
    return metrics | _best(told, seed, objective)


def _key(objective: ObjectiveInfo) -> str:
    return _word(objective.short_name)


def _word(name: str) -> str:
    """Trackers make folders and formulas of names."""
    return re.sub(r"\W+", "_", name)


def _best(told: Sequence[Trial], seed: int, objective: ObjectiveInfo) -> Metrics:
    top = max(trial.fidelity.num_steps for trial in told)
    last = [
        (trial.loss, trial)
        for trial in told
        if trial.loss is not None
        and (trial.fidelity.num_steps, trial.fidelity.seed, trial.fidelity.learning_rate_factor) == (top, seed, 1.0)
    ]
    simple = [loss for loss, trial in last if trial.origin.startswith("baseline")]
    key = _key(objective)
    best: Metrics = {f"eval_best_{key}": objective.figure(min(loss for loss, _ in last))} if last else {}
    return best | ({f"eval_best_baseline_{key}": objective.figure(min(simple))} if simple else {})


def summary_metrics(result: SearchResult) -> Metrics:
    """Figures of a finished search: the winner, its margin over the best baseline with its interval, the verdict."""
    winner, margin = result.winner.first, result.margin
    objective = result.objective
    key = _key(objective)
    metrics: Metrics = {
        "winner_total_bytes": winner.total_bytes,
        "winner_average_bits": winner.plan.average_bits,
        "winner_average_rank": winner.plan.average_rank,
        "search_seconds": result.seconds,
        "search_cost": result.cost,
        "verdict": result.verdict,
    }
    if result.winner.loss is not None:
        metrics[f"eval_winner_{key}"] = objective.figure(result.winner.loss)
    if margin is not None:
        low, high = objective.interval(*margin.bounds(result.num_searched))
        metrics |= {"eval_margin": objective.figure(margin.mean), "eval_margin_low": low, "eval_margin_high": high}
        metrics["search_is_better"] = int(margin.is_better(result.num_searched))
    return metrics
