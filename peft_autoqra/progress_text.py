"""How far a search is, in a few words."""

from __future__ import annotations

from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.search_callback import SearchProgress
from peft_autoqra.search_pace import SearchPace
from peft_autoqra.trial import Trial
from peft_autoqra.units import format_seconds


def progress_text(progress: SearchProgress, pace: SearchPace | None) -> str:
    """Such as ``"4 min 20 s left, best 4.1023 (baseline 4.1146), 23 trials, 2 running, 1 failed"``.

    What matters most comes first: narrow terminals cut off the end. Without a pace the search is over.
    """
    seconds = None if pace is None else pace.seconds_left(progress)
    parts = [] if seconds is None else [f"{format_seconds(seconds)} left"]
    if progress.best is not None:
        objective = progress.objective
        name = "" if objective == HELD_OUT_LOSS else f"{objective.name} "
        parts.append(f"best {name}{_figure(progress.best, objective)}")
        if progress.best_baseline is not None and progress.best_baseline != progress.best:
            parts[-1] += f" (baseline {_figure(progress.best_baseline, objective)})"
    parts.append("1 trial" if progress.num_told == 1 else f"{progress.num_told} trials")
    if progress.num_running > 1:
        parts.append(f"{progress.num_running} running")
    if progress.num_failed:
        parts.append(f"{progress.num_failed} failed")
    return ", ".join(parts)


def _figure(trial: Trial, objective: ObjectiveInfo) -> str:
    return "failed" if trial.loss is None else f"{objective.figure(trial.loss):.4f}"
