"""Asking a session for trials, having them evaluated, and telling what came out, until nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from peft_autoqra.search_callback import SearchCallback, SearchProgress
from peft_autoqra.search_result import SearchResult
from peft_autoqra.search_session import SearchSession
from peft_autoqra.trial import Evaluator

EXPLORING_SHARE = 0.7  # of max_seconds; the rest is for confirming what was found


class SearchLoop:
    """One run over a session, in this process.

    Args:
        session: what is asked and told.
        callbacks: are told what happens.
        calibration_seconds: spent before the first trial.
    """

    def __init__(
        self, session: SearchSession, callbacks: Sequence[SearchCallback], *, calibration_seconds: float
    ) -> None:
        """Take the time of what was evaluated before an interruption into account."""
        self._session, self._callbacks = session, callbacks
        told = [trial.result.seconds for trial in session.log.trials if trial.result is not None]
        self._seconds = calibration_seconds + sum(told)

    @contextmanager
    def announced(self) -> Iterator[Callable[[SearchResult], SearchResult]]:
        """Callbacks are told of the beginning, and of the end with the result that is handed over, if one is."""
        results: list[SearchResult] = []

        def announce(result: SearchResult) -> SearchResult:
            results.append(result)
            return result

        self._notify("on_search_begin")
        try:
            yield announce
        finally:
            self._notify("on_search_end", results[0] if results else None)

    def run(self, evaluator: Evaluator) -> None:
        """Evaluate until nothing is left to ask for, or ``max_seconds`` are over."""
        session, limit = self._session, self._session.setup.config.max_seconds
        is_finishing = False
        while (limit is None or self._seconds < limit) and (trials := session.ask(1)):
            for trial in trials:
                self._notify("on_trial_begin", trial)
                start = time.perf_counter()
                told = session.tell(trial, evaluator.evaluate(trial.plan, trial.fidelity))
                self._seconds += time.perf_counter() - start
                self._notify("on_trial_end", told)
            if limit is not None and self._seconds > EXPLORING_SHARE * limit and not is_finishing:
                session.finish()
                is_finishing = True

    @property
    def progress(self) -> SearchProgress:
        """How far the search is."""
        session, config, pending = self._session, self._session.setup.config, self._session.engine.pending
        last = [trial for trial in session.trials_at(session.engine.ledger.top) if trial.loss is not None]
        simple = [trial for trial in last if trial.origin.startswith("baseline")]
        return SearchProgress(
            trials=tuple(session.log.trials),
            num_pending=len(pending),
            cost=session.cost,
            pending_cost=sum(session.engine.ledger.level_costs[request.level] for request in pending),
            max_cost=config.max_cost,
            max_trials=config.max_trials,
            seconds=self._seconds,
            max_seconds=config.max_seconds,
            best=min(last, key=lambda trial: trial.loss or 0.0, default=None),
            best_baseline=min(simple, key=lambda trial: trial.loss or 0.0, default=None),
        )

    def _notify(self, method: str, *arguments: object) -> None:
        if self._callbacks:
            progress = self.progress
            for callback in self._callbacks:
                getattr(callback, method)(*arguments, progress)
