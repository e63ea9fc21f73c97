"""The plans of a search at its last fidelity, each against the winner."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from peft_autoqra.paired import PairedDifference, paired_difference
from peft_autoqra.plan_points import WINNER, PlanPoint, joined_name
from peft_autoqra.trial import Trial


def search_points(trials: Sequence[Trial], named: Mapping[str, Trial]) -> list[PlanPoint]:
    """One point for each plan and learning rate.

    Args:
        trials: of the search; those that failed are left out.
        named: the winner by that name, and others that have one: a trial of each.
    """
    groups: dict[tuple[str, float], dict[int, Trial]] = {}
    last = named[WINNER].fidelity.num_steps
    for trial in trials:
        if trial.loss is not None and trial.fidelity.num_steps == last:
            groups.setdefault(_key(trial), {})[trial.fidelity.seed] = trial
    names: dict[tuple[str, float], list[str]] = {}
    for name, trial in named.items():
        names.setdefault(_key(trial), []).append(name)
    winner = groups[_key(named[WINNER])]
    return [
        _point(group, winner, joined_name(names[key]) if key in names else None)
        for key, group in groups.items()
        if group.keys() & winner.keys()
    ]


def _key(trial: Trial) -> tuple[str, float]:
    return trial.plan.digest, trial.fidelity.learning_rate_factor


def _point(group: Mapping[int, Trial], winner: Mapping[int, Trial], name: str | None) -> PlanPoint:
    """Losses by seed."""
    seeds = sorted(group.keys() & winner.keys())
    difference = trial_difference([group[seed] for seed in seeds], [winner[seed] for seed in seeds])
    first = next(iter(group.values()))
    return PlanPoint(
        total_bytes=first.total_bytes,
        loss=statistics.fmean(trial.loss or 0.0 for trial in group.values()),
        difference=difference.mean,
        interval=difference.interval,
        num_seeds=len(seeds),
        stage=first.origin.partition(":")[0],
        name=name,
    )


def trial_difference(first: Sequence[Trial], second: Sequence[Trial]) -> PairedDifference:
    """Of trials that succeeded, seed by seed. Where only means were told they count as exact, as in the search."""
    sides = [[trial.result.sequence_losses if trial.result else () for trial in side] for side in (first, second)]
    lengths = {len(losses) for side in sides for losses in side}
    if len(lengths) > 1 or 0 in lengths:
        sides = [[(trial.loss or 0.0,) * 2 for trial in side] for side in (first, second)]
    return paired_difference(*sides)
