"""What the trials of a search say together: what each stage took and won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_autoqra.paired import PairedDifference, paired_difference
from peft_autoqra.plan_points import joined_name
from peft_autoqra.report_data import ComparedPlan, TrialRow

CALIBRATION = "calibration"


@dataclass(frozen=True, kw_only=True)
class StageShare:
    """What one stage took and won.

    Attributes:
        stage: its name.
        num_trials: all of them.
        num_failed: of these.
        cost: in units of one full fine-tune.
        seconds: summed time of its trials.
        best_loss: least loss at the last fidelity, first seed; None where it had no such trial.
        gain: that loss minus the least of all stages before; None for the first stage, and for one that repeats plans.
    """

    stage: str
    num_trials: int
    num_failed: int
    cost: float
    seconds: float
    best_loss: float | None
    gain: PairedDifference | None


def stage_shares(trials: Sequence[TrialRow], calibration: tuple[float, float] | None) -> list[StageShare]:
    """Every stage in the order in which they began.

    Args:
        trials: of the search.
        calibration: its cost in units of one full fine-tune and its seconds, where they are known; it comes first.
    """
    shares = []
    if calibration is not None:
        cost, seconds = calibration
        shares.append(
            StageShare(
                stage=CALIBRATION, num_trials=0, num_failed=0, cost=cost, seconds=seconds, best_loss=None, gain=None
            )
        )
    best_before: TrialRow | None = None
    decisive = _decisive(trials)
    for stage in dict.fromkeys(trial.stage for trial in trials):
        own = [trial for trial in trials if trial.stage == stage]
        best = min((trial for trial in decisive if trial.stage == stage), key=_loss, default=None)
        gain = None if best is None or best_before is None else _difference(best, best_before)
        shares.append(
            StageShare(
                stage=stage,
                num_trials=len(own),
                num_failed=sum(trial.loss is None for trial in own),
                cost=sum(trial.cost for trial in own),
                seconds=sum(trial.seconds for trial in own),
                best_loss=None if best is None else best.loss,
                gain=gain,
            )
        )
        best_before = min((trial for trial in (best_before, best) if trial is not None), key=_loss, default=None)
    return shares


def distinct_plans(compared: Sequence[ComparedPlan]) -> list[ComparedPlan]:
    """Each plan once, with all of its names: the winner may be a baseline."""
    groups: dict[int, list[ComparedPlan]] = {}
    for plan in compared:
        groups.setdefault(plan.number, []).append(plan)
    return [replace(group[0], name=joined_name([plan.name for plan in group])) for group in groups.values()]


def _at_last_fidelity(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Those that succeeded."""
    last = max((trial.num_steps for trial in trials), default=0)
    return [trial for trial in trials if trial.num_steps == last and trial.loss is not None]


def _decisive(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Of the last fidelity those of the first seed and learning rate, which can be compared."""
    top = _at_last_fidelity(trials)
    settings = [(trial.seed, trial.learning_rate_factor) for trial in sorted(top, key=lambda trial: trial.number)]
    return [trial for trial in top if (trial.seed, trial.learning_rate_factor) == settings[0]]


def _difference(first: TrialRow, second: TrialRow) -> PairedDifference:
    """Paired by sequence; losses of which only the mean is known count as exact."""
    sides = [first.sequence_losses, second.sequence_losses]
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        sides = [(_loss(first),) * 2, (_loss(second),) * 2]
    return paired_difference([sides[0]], [sides[1]])


def _loss(trial: TrialRow) -> float:
    return float("inf") if trial.loss is None else trial.loss
