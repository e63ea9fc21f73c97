"""How far a search is, in a few words."""

from __future__ import annotations

from peft_autoqra.search_callback import SearchProgress
from peft_autoqra.search_pace import SearchPace
from peft_autoqra.units import format_seconds


def progress_text(progress: SearchProgress, pace: SearchPace | None) -> str:
    """Such as ``"4 min 20 s left, best 4.1023 (baseline 4.1146), 23 trials, 2 running, 1 failed"``.

    What matters most comes first: narrow terminals cut off the end. Without a pace the search is over.
    """
    seconds = None if pace is None else pace.seconds_left(progress)
    parts = [] if seconds is None else [f"{format_seconds(seconds)} left"]
    if progress.best is not None:
        parts.append(f"best {progress.best.loss:.4f}")
        if progress.best_baseline is not None and progress.best_baseline != progress.best:
            parts[-1] += f" (baseline {progress.best_baseline.loss:.4f})"
    parts.append("1 trial" if progress.num_told == 1 else f"{progress.num_told} trials")
    if progress.num_pending > 1:
        parts.append(f"{progress.num_pending} running")
    if progress.num_failed:
        parts.append(f"{progress.num_failed} failed")
    return ", ".join(parts)
