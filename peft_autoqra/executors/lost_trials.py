"""Trials whose worker went away before they ended."""

from __future__ import annotations

from collections import Counter

from peft_autoqra.trial import Trial, TrialResult, TrialStatus

MAX_LOSSES = 3
"""A trial that loses its worker so many times has failed: it may well be what kills them."""


class LostTrials:
    """Counts how often each trial was lost."""

    def __init__(self) -> None:
        """None was."""
        self._num_losses: Counter[int] = Counter()

    def failure(self, trial: Trial, reason: str, seconds: float) -> TrialResult | None:
        """A trial was lost once more: the result that ends it; None where it is to be tried again.

        Args:
            trial: which.
            reason: what happened to its worker.
            seconds: since it was handed to that worker.
        """
        self._num_losses[trial.number] += 1
        if self._num_losses[trial.number] < MAX_LOSSES:
            return None
        error = (
            f"Its worker was lost {MAX_LOSSES} times, the last time because: {reason} If memory was short, lower "
            "per_device_train_batch_size or max_length, or use fewer workers on a machine."
        )
        return TrialResult(status=TrialStatus.FAILED, seconds=seconds, error=error)
