"""What a search asks of those who evaluate its trials."""

from __future__ import annotations

from typing import Protocol

from peft_autoqra.executors.worker_source import WorkerSource
from peft_autoqra.trial import Trial, TrialResult


class TrialExecutor(Protocol):
    """Evaluates trials, several side by side where it can. One search uses it once, from one thread.

    A trial that is lost with its worker is the executor's to repeat: each number that was submitted comes back from
    :meth:`wait` once. What cannot be evaluated comes back failed; an exception is for what no trial is to blame for,
    and ends the search, which can be continued.
    """

    @property
    def num_slots(self) -> int:
        """Trials that should be under way now, at least 1; may change while the search runs."""
        ...

    def open(self, source: WorkerSource) -> None:
        """The search begins.

        Raises:
            ExecutorError: there is nothing to evaluate with.
        """
        ...

    def submit(self, trial: Trial) -> None:
        """Begin to evaluate a trial; returns at once."""
        ...

    def wait(self) -> list[tuple[int, TrialResult]]:
        """Numbers and results of trials that have ended since the last call.

        Returns when there is at least one, or when there are more slots than when it was called.

        Raises:
            ExecutorError: nothing is left to evaluate with.
        """
        ...

    def close(self) -> None:
        """The search is over or was interrupted: what is under way is not wanted any more. May be called twice."""
        ...
