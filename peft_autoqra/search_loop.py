"""Asking a session for trials, having them evaluated, and telling what came out, until nothing is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from peft_autoqra.executors.executor import TrialExecutor
from peft_autoqra.search_callback import SearchCallback, SearchProgress
from peft_autoqra.search_result import SearchResult
from peft_autoqra.search_session import SearchSession
from peft_autoqra.trial import Trial, TrialResult

EXPLORING_SHARE = 0.7  # of max_seconds; the rest is for confirming what was found
DETERMINISTIC_WINDOW = 8
"""Trials that are asked for and not told, at most, where the number of workers may not matter. Stage 2 has some twelve
trials by default: proposing more of them without results would make it blind."""


class SearchLoop:
    """One run over a session.

    As many trials are asked for as the executor has slots, and they are told as they arrive. A deterministic run asks
    for a fixed number instead and tells in the order of asking, so that what is asked depends on results alone.

    Args:
        session: what is asked and told.
        callbacks: are told what happens.
        calibration_seconds: spent before the first trial.
        deterministic: whether neither the number of workers nor the order of arrival may matter.
    """

    def __init__(
        self,
        session: SearchSession,
        callbacks: Sequence[SearchCallback],
        *,
        calibration_seconds: float,
        deterministic: bool = False,
    ) -> None:
        """Take the time of what was evaluated before an interruption into account."""
        self._session, self._callbacks, self._is_deterministic = session, callbacks, deterministic
        self._calibration_seconds = calibration_seconds
        self._earlier_seconds = elapsed_seconds(session.log.trials)
        self._start: float | None = None
        self._open: dict[int, Trial] = {}  # asked and not told, in order
        self._queue: deque[Trial] = deque()  # of these, not submitted
        self._ended: dict[int, TrialResult] = {}  # of these, with a result, as they arrived
        self._is_exhausted = False  # the session has nothing to ask for until it is told something
        self._is_finishing = False

    @contextmanager
    def announced(self) -> Iterator[Callable[[SearchResult], SearchResult]]:
        """Callbacks are told of the beginning, and of the end with the result that is handed over, if one is."""
        results: list[SearchResult] = []

        def announce(result: SearchResult) -> SearchResult:
            results.append(result)
            return result

        try:
            self._notify("on_search_begin")
            yield announce
        finally:
            self._notify("on_search_end", results[0] if results else None)

    def run(self, executor: TrialExecutor) -> None:
        """Evaluate until nothing is left to ask for, or ``max_seconds`` are over; what runs then is still told."""
        self._start = time.perf_counter()
        while True:
            self._ask(executor)
            self._submit(executor)
            if not self._tellable:
                if not self._num_running:
                    return
                self._ended |= executor.wait()
            self._tell()

    def _ask(self, executor: TrialExecutor) -> None:
        while not (self._is_exhausted or self._is_late(1.0)):
            num = (DETERMINISTIC_WINDOW if self._is_deterministic else executor.num_slots) - len(self._open)
            if num < 1:
                return
            trials = self._session.ask(num)
            self._open |= {trial.number: trial for trial in trials}
            self._queue += trials
            self._is_exhausted = not trials

    def _submit(self, executor: TrialExecutor) -> None:
        while self._queue and self._num_running < executor.num_slots and not self._is_late(1.0):
            trial = self._queue.popleft()
            self._notify("on_trial_begin", trial)
            executor.submit(trial)

    @property
    def _tellable(self) -> list[int]:
        """All trials that have ended; in a deterministic run the one that was asked for first, if it has.

        With that one told the next is asked for before another is told, whether that has ended already or not.
        """
        first = list(self._open)[:1]
        return [number for number in (first if self._is_deterministic else self._ended) if number in self._ended]

    def _tell(self) -> None:
        for number in self._tellable:
            result = replace(self._ended.pop(number), ended_seconds=self._trial_seconds)
            told = self._session.tell(self._open.pop(number), result)
            self._is_exhausted = False
            self._notify("on_trial_end", told)
        if self._is_late(EXPLORING_SHARE) and not self._is_finishing:
            self._session.finish()
            self._is_finishing = True

    @property
    def _num_running(self) -> int:
        return len(self._open) - len(self._queue) - len(self._ended)

    @property
    def _trial_seconds(self) -> float:
        """On the wall clock, without calibration and interruptions."""
        return self._earlier_seconds + (time.perf_counter() - self._start if self._start is not None else 0.0)

    def _is_late(self, share: float) -> bool:
        limit = self._session.setup.config.max_seconds
        return limit is not None and self._calibration_seconds + self._trial_seconds >= share * limit

    @property
    def progress(self) -> SearchProgress:
        """How far the search is."""
        session, setup, ledger = self._session, self._session.setup, self._session.engine.ledger
        last = [trial for trial in session.trials_at(ledger.top) if trial.loss is not None]
        simple = [trial for trial in last if trial.origin.startswith("baseline")]
        return SearchProgress(
            trials=tuple(session.log.trials),
            num_running=self._num_running,
            cost=session.cost,
            pending_cost=sum(ledger.level_costs[request.level] for request in session.engine.pending),
            max_cost=setup.config.max_cost,
            max_trials=setup.config.max_trials,
            seconds=self._calibration_seconds + self._trial_seconds,
            max_seconds=setup.config.max_seconds,
            best=min(last, key=lambda trial: trial.loss or 0.0, default=None),
            best_baseline=min(simple, key=lambda trial: trial.loss or 0.0, default=None),
            objective=setup.objective_info,
        )

    def _notify(self, method: str, *arguments: object) -> None:
        if self._callbacks:
            progress = self.progress
            for callback in self._callbacks:
                getattr(callback, method)(*arguments, progress)


def elapsed_seconds(trials: Sequence[Trial]) -> float:
    """Wall-clock time that trials took side by side; those that nobody looked at a clock for come one after another.

    Args:
        trials: in the order of telling.
    """
    seconds = 0.0
    for result in (trial.result for trial in trials if trial.result is not None):
        ended = result.ended_seconds
        seconds = seconds + result.seconds if ended is None else max(seconds, ended)
    return seconds
