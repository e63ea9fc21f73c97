"""Pools of processes, and what takes their form."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from peft_autoqra.errors import ExecutorError
from peft_autoqra.executors.futures_executor import FuturesExecutor
from peft_autoqra.search_callback import SearchCallback
from peft_autoqra.trial import TrialStatus
from tests.evaluation.tiny_questions import F1_SCRIPT, questions, write_script
from tests.executors.conftest import check_counted_once, outcomes

SPAWN = multiprocessing.get_context("spawn")


class PoolOfOnesOwn(Executor):
    """As any scheduler's: knows nothing of numbers of processes. Here the one process is this one.

    Args:
        misfortunes: number of a trial to how often it is lost.
    """

    def __init__(self, misfortunes: dict[int, int] | None = None) -> None:
        self.misfortunes = dict(misfortunes or {})
        self.is_shut_down = False

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        number = args[-1]["number"]
        if self.misfortunes.get(number, 0):
            self.misfortunes[number] -= 1
            future.set_exception(ConnectionResetError("the machine went away"))
            return future
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait=True, *, cancel_futures=False) -> None:
        self.is_shut_down = True


@pytest.mark.timeout(240)
def test_a_pool_of_processes_gives_what_one_process_gives_and_another_goes_on(make_searcher, whole, tmp_path):
    """One of two processes is killed; its pool is of no use then, and the search goes on without it."""

    class Kill(SearchCallback):
        def on_trial_end(self, trial, progress):
            if trial.number == 4:
                os.kill(next(iter(pool._processes)), signal.SIGKILL)

    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        searcher = make_searcher(tmp_path, callbacks=[Kill()])
        with pytest.raises(ExecutorError, match=r"ProcessPoolExecutor takes no more trials .*with a new pool goes on"):
            searcher.run(pool, deterministic=True)
    assert not list(tmp_path.glob("workers-*"))
    result = make_searcher(tmp_path).run(deterministic=True)
    assert outcomes(result.trials) == whole
    check_counted_once(result)


def test_any_pool_may_lose_trials(make_searcher, whole, tmp_path):
    """Two losses are made good; the third one is the trial's fault."""
    pool = PoolOfOnesOwn({1: 2, 4: 3})
    with pytest.raises(ExecutorError, match=r"num_workers=None of the PoolOfOnesOwn.*FuturesExecutor\(pool, num_"):
        make_searcher(tmp_path).run(pool)
    executor = FuturesExecutor(pool, num_workers=2, threads_per_worker=1)
    result = make_searcher(tmp_path).run(executor, deterministic=True)
    check_counted_once(result)
    assert outcomes(result.trials)[:4] == whole[:4]
    failed = result.trials[4]
    assert failed.result.status is TrialStatus.FAILED
    assert "lost 3 times, the last time because: ConnectionResetError: the machine went away" in failed.result.error
    assert not pool.is_shut_down  # it is not ours


@pytest.mark.timeout(240)
def test_a_metric_script_decides_in_other_processes(make_searcher, metric_modules, tmp_path, monkeypatch):
    """The script is found from another folder than the search was set up in."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(metric_modules))  # of the processes
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    write_script(tmp_path, "macro_f1", F1_SCRIPT)
    monkeypatch.chdir(tmp_path)
    settings = {"data": (questions(seed=1), questions(seed=2)), "objective": "./macro_f1.py:f1", "max_trials": 5}
    searchers = [make_searcher(tmp_path / name, **settings) for name in ("pool", "one")]
    monkeypatch.chdir("/")
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        result = searchers[0].run(FuturesExecutor(pool, threads_per_worker=1), deterministic=True)
    assert not [trial.result.error for trial in result.trials if trial.result.error]
    assert all(trial.result.metrics["macro_f1:f1"] == -trial.loss for trial in result.trials)
    assert outcomes(result.trials) == outcomes(searchers[1].run(deterministic=True).trials)


def test_an_objective_that_cannot_be_sent_is_refused_before_calibration(make_searcher, tmp_path, monkeypatch):
    searcher = make_searcher(tmp_path, judge=lambda model, tokenizer, examples: [0.0 for _ in examples])
    monkeypatch.setattr(searcher, "calibrate", lambda: pytest.fail("calibrated"))
    with pytest.raises(ExecutorError, match=r"objective cannot be sent to other processes .*in a module"):
        searcher.run(FuturesExecutor(PoolOfOnesOwn(), num_workers=1))
    assert not searcher.output_dir.joinpath("trials.jsonl").exists()


def test_what_a_worker_lacks_ends_the_search_before_a_trial_is_blamed(make_searcher, tmp_path):
    class Elsewhere(FuturesExecutor):
        def open(self, source):
            super().open(source)
            source.files.folder.rename(tmp_path / "elsewhere")

    with pytest.raises(ExecutorError, match="could not begin: A worker does not see"):
        make_searcher(tmp_path).run(Elsewhere(PoolOfOnesOwn(), num_workers=1))
    assert make_searcher(tmp_path).run().winner.loss is not None


def test_pools_that_cannot_work_are_refused_at_once(make_searcher, tmp_path):
    searcher = make_searcher(tmp_path)
    with ThreadPoolExecutor(2) as threads, pytest.raises(ExecutorError, match=r"threads would share one model.*spawn"):
        searcher.run(threads)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, fork) as pool, pytest.raises(ExecutorError, match=r"forked process can hang.*spawn"):
        searcher.run(pool)
    with pytest.raises(ExecutorError, match="num_workers=0"):
        FuturesExecutor(PoolOfOnesOwn(), num_workers=0)
    assert not searcher.output_dir.joinpath("trials.jsonl").exists()


def test_a_pool_that_was_shut_down(make_searcher, tmp_path):
    pool = ProcessPoolExecutor(1, mp_context=SPAWN)
    pool.shutdown()
    with pytest.raises(ExecutorError, match=r"takes no more trials .*after shutdown"):
        make_searcher(tmp_path).run(pool)


def test_without_a_search_there_is_nothing_to_submit_to(make_searcher, tmp_path):
    searcher = make_searcher(tmp_path)
    with searcher.opened():
        (trial,) = searcher.ask()
    with pytest.raises(ExecutorError, match="not opened"):
        FuturesExecutor(PoolOfOnesOwn(), num_workers=1).submit(trial)
