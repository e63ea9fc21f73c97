"""What a search tells others while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.search_result import SearchResult
from peft_autoqra.trial import Trial


@dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """How far a search is.

    Attributes:
        trials: that have ended, in the order of telling, those before an interruption included.
        num_running: trials that were handed out and have not ended.
        cost: booked so far, calibration and trials without a result included, in units of one full fine-tune.
        pending_cost: of it, what trials without a result take, whether they run or wait for a worker.
        max_cost: its limit.
        max_trials: limit of their number; None for none.
        seconds: wall-clock time of the trials and of calibration, interruptions left out.
        max_seconds: its limit; None for none.
        best: the trial with the least loss at the last fidelity so far; None before there is one.
        best_baseline: likewise among the plans that need no search.
        objective: what the losses are of.
    """

    trials: tuple[Trial, ...]
    num_running: int
    cost: float
    pending_cost: float
    max_cost: float
    max_trials: int | None
    seconds: float
    max_seconds: float | None
    best: Trial | None
    best_baseline: Trial | None
    objective: ObjectiveInfo = HELD_OUT_LOSS

    @property
    def num_told(self) -> int:
        """Trials that have ended."""
        return len(self.trials)

    @property
    def num_failed(self) -> int:
        """Of these, without a loss."""
        return sum(trial.loss is None for trial in self.trials)

    @property
    def ended_cost(self) -> float:
        """Of what has ended, calibration included, in units of one full fine-tune."""
        return self.cost - self.pending_cost

    @property
    def fraction(self) -> float:
        """How much of the limit is used up that will be reached first; below 1 also where a search ends early."""
        limits = [(self.ended_cost, self.max_cost), (self.num_told, self.max_trials), (self.seconds, self.max_seconds)]
        return min(1.0, max(used / limit for used, limit in limits if limit is not None))


class SearchCallback:
    """Is called by a search; every method may be left out.

    What one raises ends the search, which can be continued; :meth:`on_search_end` is called all the same, also when
    :meth:`on_search_begin` of another callback failed.
    """

    def on_search_begin(self, progress: SearchProgress) -> None:
        """Calibration is done, and what the directory holds of the search is replayed."""

    def on_trial_begin(self, trial: Trial, progress: SearchProgress) -> None:
        """A trial is handed out."""

    def on_trial_end(self, trial: Trial, progress: SearchProgress) -> None:
        """A trial has ended, successfully or not, and is on disk."""

    def on_search_end(self, result: SearchResult | None, progress: SearchProgress) -> None:
        """The search is over; ``result`` is None where it was interrupted or has no answer."""
