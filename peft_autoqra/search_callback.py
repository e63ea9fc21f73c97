"""What a search tells others while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from peft_autoqra.search_result import SearchResult
from peft_autoqra.trial import Trial


@dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """How far a search is.

    Attributes:
        num_told: trials that have ended, those before an interruption included.
        num_failed: of these, without a loss.
        num_pending: trials that were handed out and have not ended.
        cost: booked so far, calibration included, in units of one full fine-tune.
        max_cost: its limit.
        seconds: wall-clock time of the trials and of calibration, interruptions left out.
        best: the trial with the least loss at the last fidelity so far; None before there is one.
        best_baseline: likewise among the plans that need no search.
    """

    num_told: int
    num_failed: int
    num_pending: int
    cost: float
    max_cost: float
    seconds: float
    best: Trial | None
    best_baseline: Trial | None


class SearchCallback:
    """Is called by a search; every method may be left out. What it raises ends the search."""

    def on_search_begin(self, progress: SearchProgress) -> None:
        """Calibration is done, and what the directory holds of the search is replayed."""

    def on_trial_begin(self, trial: Trial, progress: SearchProgress) -> None:
        """A trial is handed out."""

    def on_trial_end(self, trial: Trial, progress: SearchProgress) -> None:
        """A trial has ended, successfully or not, and is on disk."""

    def on_search_end(self, result: SearchResult | None, progress: SearchProgress) -> None:
        """The search is over; ``result`` is None where it was interrupted or has no answer."""
