"""What the trials of a search say together: plans against each other, and what each stage won."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_autoqra.paired import PairedDifference, paired_difference
from peft_autoqra.plan_points import PlanPoint
from peft_autoqra.report_data import ComparedPlan, TrialRow

CALIBRATION = "calibration"


@dataclass(frozen=True, kw_only=True)
class StageShare:
    """What one stage took and won.

    Attributes:
        stage: its name.
        num_trials: all of them.
        num_failed: of these.
        cost: in units of one full fine-tune; None where it is not known.
        seconds: summed time of its trials.
        best_loss: least loss at the last fidelity, first seed, nats per token; None where it had no such trial.
        gain: that loss minus the least of all stages before; None for the first stage, and for one that repeats plans.
    """

    stage: str
    num_trials: int
    num_failed: int
    cost: float | None
    seconds: float
    best_loss: float | None
    gain: PairedDifference | None


def stage_shares(trials: Sequence[TrialRow], calibration_cost: float | None) -> list[StageShare]:
    """Every stage in the order in which they began, calibration first where its cost is known."""
    shares = []
    if calibration_cost is not None:
        shares.append(_share(CALIBRATION, (), calibration_cost, None, None))
    best_before: TrialRow | None = None
    decisive = _decisive(trials)
    for stage in dict.fromkeys(trial.stage for trial in trials):
        own = [trial for trial in trials if trial.stage == stage]
        best = min((trial for trial in decisive if trial.stage == stage), key=_loss, default=None)
        gain = None if best is None or best_before is None else _difference([best], [best_before])
        shares.append(_share(stage, own, sum(trial.cost for trial in own), best, gain))
        best_before = min((trial for trial in (best_before, best) if trial is not None), key=_loss, default=None)
    return shares


def plan_points(trials: Sequence[TrialRow], compared: Sequence[ComparedPlan]) -> list[PlanPoint]:
    """Every plan at the last fidelity, relative to the winner; while there is none, to the first plan tried.

    Args:
        trials: of the search.
        compared: the winner, then the baselines; empty for a search under way.
    """
    groups: dict[tuple[str, float], list[TrialRow]] = {}
    for trial in _at_last_fidelity(trials):
        groups.setdefault((trial.layers, trial.learning_rate_factor), []).append(trial)
    names = {plan.number: plan.name for plan in distinct_plans(compared)}
    winner = compared[0].number if compared else None
    first = next(iter(groups.values()), [])
    reference = next((group for group in groups.values() if group[0].number == winner), first)
    return [_point(group, reference, names.get(group[0].number)) for group in groups.values()]


def distinct_plans(compared: Sequence[ComparedPlan]) -> list[ComparedPlan]:
    """Each plan once: the winner may be a baseline, and is called such as ``"allocation (winner)"`` then."""
    distinct: dict[int, ComparedPlan] = {}
    for plan in compared:
        known = distinct.get(plan.number)
        distinct[plan.number] = plan if known is None else replace(known, name=f"{plan.name} ({known.name})")
    return list(distinct.values())


def _point(group: Sequence[TrialRow], reference: Sequence[TrialRow], name: str | None) -> PlanPoint:
    seeds = {trial.seed for trial in group} & {trial.seed for trial in reference}
    own, other = ([trial for trial in side if trial.seed in seeds] for side in (group, reference))
    difference = _difference(own, other) if own else _difference(group[:1], reference[:1])
    return PlanPoint(
        total_bytes=group[0].total_bytes,
        loss=statistics.fmean(_loss(trial) for trial in group),
        difference=difference.mean,
        interval=difference.interval,
        num_seeds=max(len(own), 1),
        stage=group[0].stage,
        name=name,
    )


def _at_last_fidelity(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Those that succeeded."""
    last = max((trial.num_steps for trial in trials), default=0)
    return [trial for trial in trials if trial.num_steps == last and trial.loss is not None]


def _decisive(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Of the last fidelity those of the first seed and the recipe's learning rate, which can be compared."""
    top = _at_last_fidelity(trials)
    first = min((trial.seed for trial in top), default=0)
    return [trial for trial in top if trial.seed == first and trial.learning_rate_factor == 1.0]


def _difference(first: Sequence[TrialRow], second: Sequence[TrialRow]) -> PairedDifference:
    """Paired by sequence and seed; losses of which only the mean is known count as exact."""
    sides = [[trial.sequence_losses or (_loss(trial),) * 2 for trial in side] for side in (first, second)]
    if {len(losses) for losses in sides[0]} != {len(losses) for losses in sides[1]}:
        sides = [[(_loss(trial),) * 2 for trial in side] for side in (first, second)]
    return paired_difference(*sides)


def _share(
    stage: str,
    trials: Sequence[TrialRow],
    cost: float | None,
    best: TrialRow | None,
    gain: PairedDifference | None,
) -> StageShare:
    return StageShare(
        stage=stage,
        num_trials=len(trials),
        num_failed=sum(trial.loss is None for trial in trials),
        cost=cost,
        seconds=sum(trial.seconds for trial in trials),
        best_loss=None if best is None else best.loss,
        gain=gain,
    )


def _loss(trial: TrialRow) -> float:
    return float("inf") if trial.loss is None else trial.loss
