"""Trials in the processes of any ``concurrent.futures.Executor``."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from peft_autoqra.errors import AutoQRAError, ExecutorError
from peft_autoqra.executors.lost_trials import LostTrials
from peft_autoqra.executors.worker import WorkerSettings, evaluate_here
from peft_autoqra.executors.worker_source import WorkerSource
from peft_autoqra.trial import Trial, TrialResult


class FuturesExecutor:
    """Evaluates in the processes of a pool: Python's, Dask's or MPI's; a :class:`TrialExecutor`.

    Every process loads model and calibration with its first trial and keeps them; it evaluates one trial at a time.
    All of them have to see the search's folders. The pool stays its owner's to shut down.

    Args:
        pool: of processes. Python's own has to start them by ``spawn`` or ``forkserver``.
        num_workers: processes of the pool; None asks the pool, which Python's own can tell.
        threads_per_worker: threads of one process's computations; None shares those of this process out.

    Raises:
        ExecutorError: threads, forked processes, or no number of workers.
    """

    def __init__(
        self, pool: Executor, *, num_workers: int | None = None, threads_per_worker: int | None = None
    ) -> None:
        """Check; nothing is started yet."""
        _check(pool)
        found = getattr(pool, "_max_workers", None) if num_workers is None else num_workers
        if not isinstance(found, int) or found < 1:
            raise ExecutorError(
                f"num_workers={found!r} of the {type(pool).__name__}: give their number, at least 1, as in "
                "FuturesExecutor(pool, num_workers=4)."
            )
        self._pool, self._num_workers = pool, found
        num_threads = threads_per_worker or max(1, torch.get_num_threads() // found)
        self._settings = WorkerSettings(num_threads, memory_share=1 / found)  # as if all were on one machine
        self._source: WorkerSource | None = None
        self._running: dict[Future[dict[str, Any]], tuple[Trial, float]] = {}
        self._lost = LostTrials()

    @property
    def num_slots(self) -> int:
        """As many as the pool has processes."""
        return self._num_workers

    def open(self, source: WorkerSource) -> None:
        """Write what the processes need."""
        self._source = source
        _ = source.files

    def submit(self, trial: Trial) -> None:
        """Hand it to the pool.

        Raises:
            ExecutorError: the pool is broken or was shut down.
        """
        self._submit(trial)

    def _submit(self, trial: Trial) -> None:
        if self._source is None:
            raise ExecutorError("The executor is not opened; give it to AutoQRASearcher.run.")
        try:
            future = self._pool.submit(evaluate_here, self._source.files, self._settings, trial.to_dict())
        except RuntimeError as error:
            raise _broken(self._pool, error) from error
        self._running[future] = (trial, time.perf_counter())

    def wait(self) -> list[tuple[int, TrialResult]]:
        """What ended; a trial that was lost is submitted again.

        Raises:
            ExecutorError: the pool is broken, or its processes cannot be used.
        """
        results: list[tuple[int, TrialResult]] = []
        while self._running and not results:
            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                trial, start = self._running.pop(future)
                result = self._result(future, trial, time.perf_counter() - start)
                if result is None:
                    self._submit(trial)
                else:
                    results.append((trial.number, result))
        return results

    def _result(self, future: Future[dict[str, Any]], trial: Trial, seconds: float) -> TrialResult | None:
        """None where the trial is to be tried again."""
        try:
            return TrialResult.from_dict(future.result())
        except BrokenExecutor as error:
            raise _broken(self._pool, error) from error
        except AutoQRAError as error:
            raise ExecutorError(f"A worker could not begin: {error}") from error
        except Exception as error:  # such as Dask's KilledWorker: what schedulers raise for a task that they lost
            return self._lost.failure(trial, f"{type(error).__name__}: {error}", seconds)

    def close(self) -> None:
        """Cancel what has not begun."""
        for future in self._running:
            future.cancel()
        self._running.clear()


def _check(pool: Executor) -> None:
    if isinstance(pool, ThreadPoolExecutor):
        raise ExecutorError(
            f"{type(pool).__name__}: threads would share one model. Use processes, as in "
            'ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")), or leave the executor out.'
        )
    context = getattr(pool, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ExecutorError(
            "A forked process can hang in PyTorch's threads; give the pool "
            'mp_context=multiprocessing.get_context("spawn").'
        )


def _broken(pool: Executor, error: Exception) -> ExecutorError:
    return ExecutorError(
        f"The {type(pool).__name__} takes no more trials ({str(error).rstrip('.')}). If a process of it died, the "
        "operating system may have killed it for want of memory, or the script starts the search outside of "
        '`if __name__ == "__main__":`. What has ended is on disk: the same search with a new pool goes on.'
    )
