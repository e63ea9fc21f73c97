"""How long a search will still take."""

from __future__ import annotations

from peft_autoqra.search_callback import SearchProgress


class SearchPace:
    """Estimates the time left from the trials that have ended, those before an interruption included."""

    def __init__(self) -> None:
        """Nothing was seen to end yet."""
        self._num_ended = 0
        self._num_beside = 0

    def trial_ended(self, progress: SearchProgress) -> None:
        """Count how many trials run beside each other: the one that has ended, and the others."""
        self._num_ended += 1
        self._num_beside += 1 + progress.num_running

    @property
    def num_workers(self) -> float:
        """Trials that run side by side, on average over those that ended; 1 before one did."""
        return self._num_beside / self._num_ended if self._num_ended else 1.0

    def seconds_left(self, progress: SearchProgress) -> float | None:
        """Wall-clock time until the first limit is reached; None before a trial has ended.

        Trials are taken to go on at the seconds per cost of those that have ended. Summed over all of them: single
        trials of different fidelities differ in it.
        """
        costs = sum(trial.cost for trial in progress.trials)
        if not costs:
            return None
        left = progress.max_cost - progress.ended_cost
        if progress.max_trials is not None:
            left = min(left, (progress.max_trials - progress.num_told) * costs / progress.num_told)
        seconds = sum(trial.result.seconds for trial in progress.trials if trial.result is not None)
        estimate = max(0.0, left) * seconds / costs / self.num_workers
        if progress.max_seconds is not None:
            estimate = min(estimate, max(0.0, progress.max_seconds - progress.seconds))
        return estimate
