"""Searches with several trials under way, told in any order, by executors that come, go and are interrupted."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_autoqra.sealed_record import unsealed
from peft_autoqra.search_callback import SearchCallback
from peft_autoqra.search_loop import DETERMINISTIC_WINDOW, SearchLoop, elapsed_seconds
from peft_autoqra.search_session import SearchSession
from peft_autoqra.trial import Trial, TrialResult
from peft_autoqra.trial_log import TOLD_AT, Finished
from tests.tiny_session import evaluate, make_ladder, session_opener, session_setup

QUICKLY = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class ShuffledExecutor:
    """Ends what is under way in an order drawn at random, sometimes several at once; its slots may come and go."""

    def __init__(self, num_slots: int, seed: int = 0, max_slots: int | None = None, stop_after: int = -1) -> None:
        self.num_slots, self.max_slots = num_slots, max_slots
        self.submitted: list[int] = []
        self._rng = np.random.default_rng(seed)
        self._running: list[Trial] = []
        self._num_left = stop_after

    def submit(self, trial: Trial) -> None:
        assert len(self._running) < self.num_slots
        self._running.append(trial)
        self.submitted.append(trial.number)

    def wait(self) -> list[tuple[int, TrialResult]]:
        assert self._running
        if self._num_left == 0:
            raise KeyboardInterrupt
        self._num_left -= 1
        before = self.num_slots
        if self.max_slots is not None:
            self.num_slots = int(self._rng.integers(1, self.max_slots + 1))
        if self.num_slots > before:
            return []
        num = self._rng.integers(1, len(self._running) + 1)
        ended = [self._running.pop(self._rng.integers(len(self._running))) for _ in range(num)]
        return [(trial.number, evaluate(trial)) for trial in ended]


@pytest.fixture(scope="module")
def setup(tiny_llama, tmp_path_factory):
    return session_setup(tiny_llama(), tmp_path_factory.mktemp("sft"))


@pytest.fixture
def open_session(setup, tmp_path_factory):
    """In a directory of its own each time it is asked for a first session of a name."""

    def opened(name: str | None = None, max_trials: int = 13) -> SearchSession:
        directory = tmp_path_factory.mktemp("logs") if name is None else tmp_path_factory.getbasetemp()
        return session_opener(setup, directory)(name or "log", make_ladder(max_trials))

    return opened


def searched(session: SearchSession, executor: ShuffledExecutor, callback=None, **settings) -> SearchSession:
    callbacks = [] if callback is None else [callback]
    SearchLoop(session, callbacks, calibration_seconds=0.0, **settings).run(executor)
    return session


def content(session: SearchSession) -> list[dict]:
    """The log without times."""
    records = [unsealed(json.loads(line)) for line in session.log.path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "trial":
            assert record["result"].pop("ended_seconds") >= 0
            assert record.pop(TOLD_AT) > 0
    return records


def numbers(session: SearchSession) -> list[int]:
    return [trial.number for trial in session.log.trials]


def check_whole(session: SearchSession) -> None:
    """Every trial was told once and paid for once."""
    assert session.is_done
    assert sorted(numbers(session)) == list(range(len(numbers(session))))
    assert session.cost == pytest.approx(0.5 + sum(trial.cost for trial in session.log.trials))
    assert {"evolution", "trust_region", "confirmation"} <= {trial.origin for trial in session.log.trials}


@pytest.fixture(scope="module")
def deterministic(setup, tmp_path_factory):
    """With one worker."""
    session = session_opener(setup, tmp_path_factory.mktemp("one"))("log", make_ladder())
    return searched(session, ShuffledExecutor(1), deterministic=True)


@QUICKLY
@given(num_slots=st.sampled_from([1, 2, 3, DETERMINISTIC_WINDOW, 30]), seed=st.integers(0, 99), comes=st.booleans())
def test_deterministic_searches_do_not_depend_on_workers_or_arrival(
    open_session, deterministic, num_slots, seed, comes
):
    executor = ShuffledExecutor(num_slots, seed, max_slots=num_slots if comes else None)
    session = searched(open_session(), executor, deterministic=True)
    check_whole(session)
    assert content(session) == content(deterministic)
    assert session.decision() == deterministic.decision()


@QUICKLY
@given(stop_after=st.integers(0, 12), slots=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99))
def test_an_interrupted_deterministic_search_goes_on_with_any_number(
    open_session, deterministic, stop_after, slots, seed
):
    name = f"cut-{stop_after}-{slots}-{seed}-{time.perf_counter_ns()}"
    try:
        searched(open_session(name), ShuffledExecutor(slots[0], seed, stop_after=stop_after), deterministic=True)
    except KeyboardInterrupt:
        searched(open_session(name), ShuffledExecutor(slots[1], seed), deterministic=True)
    resumed = open_session(name)
    check_whole(resumed)
    told = [record for record in content(resumed) if record["kind"] == "trial"]
    assert told == [record for record in content(deterministic) if record["kind"] == "trial"]


@QUICKLY
@given(stop_after=st.integers(0, 12), max_slots=st.integers(1, 6), seed=st.integers(0, 99))
def test_arrivals_in_any_order_are_replayed_and_gone_on_from(open_session, stop_after, max_slots, seed):
    name = f"any-{stop_after}-{max_slots}-{seed}-{time.perf_counter_ns()}"
    session = open_session(name)
    try:
        searched(session, ShuffledExecutor(2, seed, max_slots, stop_after))
    except KeyboardInterrupt:
        replayed = open_session(name)
        assert numbers(replayed) == numbers(session)
        assert replayed.engine.pending == session.engine.pending
        assert replayed.cost == session.cost
        open_trials = {trial.number for trial in replayed.ask(99)}
        searched(open_session(name), executor := ShuffledExecutor(3, seed + 1, max_slots))
        assert open_trials <= set(executor.submitted)
        assert not set(executor.submitted) & set(numbers(session))
    check_whole(open_session(name))


def test_one_slot_asks_as_a_plain_loop_does(open_session):
    session, plain = searched(open_session(), ShuffledExecutor(1)), open_session()
    while trials := plain.ask(1):
        for trial in trials:
            plain.tell(trial, replace(evaluate(trial), ended_seconds=0.0))
    assert content(session) == content(plain)
    assert session.decision() == plain.decision()


def test_slots_that_come_are_used_at_once(open_session):
    class Growing(ShuffledExecutor):
        def wait(self):
            most.append(len(self._running))
            if self.num_slots < 5:
                self.num_slots += 1
                return []
            return super().wait()

    most: list[int] = []
    check_whole(searched(open_session(max_trials=30), Growing(1)))
    assert most[:3] == [1, 2, 3]  # baselines
    assert max(most) == 5


@pytest.mark.parametrize("deterministic", [False, True])
def test_callbacks_hear_of_each_trial_once_when_it_begins_and_when_it_is_told(open_session, deterministic):
    events = []

    class Listener(SearchCallback):
        def on_trial_begin(self, trial, progress):
            events.append(("begin", trial.number, progress.num_told))

        def on_trial_end(self, trial, progress):
            assert trial.result is not None
            events.append(("end", trial.number, progress.num_told))

    session = searched(open_session(), ShuffledExecutor(3), Listener(), deterministic=deterministic)
    begun, ended = ([event[1] for event in events if event[0] == kind] for kind in ("begin", "end"))
    assert sorted(begun) == list(range(len(begun)))
    assert ended == numbers(session)
    assert all(events.index(("end", n, k)) > begun.index(n) for kind, n, k in events if kind == "end")
    assert [event[2] for event in events if event[0] == "end"] == list(range(1, len(ended) + 1))


def test_what_waits_for_a_worker_does_not_run(open_session):
    """A deterministic search asks for more than one worker can take; time left goes by what runs side by side."""

    class Listener(SearchCallback):
        def on_trial_begin(self, trial, progress):
            running.append((progress.num_running, len(session.engine.pending)))

        def on_trial_end(self, trial, progress):
            assert progress.ended_cost == pytest.approx(0.5 + sum(one.cost for one in progress.trials))

    running: list[tuple[int, int]] = []
    session = open_session()
    searched(session, ShuffledExecutor(1), Listener(), deterministic=True)
    assert {num for num, _ in running} == {1}
    assert max(pending for _, pending in running) > 1


def test_callbacks_that_began_hear_of_the_end_when_another_one_fails(open_session):
    class Fails(SearchCallback):
        def on_search_begin(self, progress):
            raise ValueError("no")

    class Listener(SearchCallback):
        def on_search_end(self, result, progress):
            ends.append(result)

    ends: list[object] = []
    loop = SearchLoop(open_session(), [Listener(), Fails()], calibration_seconds=0.0)
    with pytest.raises(ValueError, match="no"), loop.announced():
        pytest.fail("it began")
    assert ends == [None]


class SleepingExecutor(ShuffledExecutor):
    """Each trial takes a tenth of a second, beside the others."""

    def wait(self):
        time.sleep(0.1)
        return [(number, replace(result, seconds=0.1)) for number, result in super().wait()]


def limited(setup, directory, max_seconds: float) -> SearchSession:
    changed = copy.copy(setup)
    changed.config = replace(setup.config, max_seconds=max_seconds)
    return session_opener(changed, directory)("log", make_ladder(300))


@pytest.mark.parametrize("deterministic", [False, True])
def test_max_seconds_are_of_the_clock_on_the_wall(setup, tmp_path, deterministic):
    session, executor = limited(setup, tmp_path, 1.0), SleepingExecutor(3)
    searched(session, executor, deterministic=deterministic)
    finished = [number for number, event in enumerate(session.log.events) if event == Finished()]
    assert len(finished) == 1
    before = [event for event in session.log.events[: finished[0]] if isinstance(event, Trial)]
    assert elapsed_seconds(before) < 1.0
    assert sorted(executor.submitted) == sorted(numbers(session))  # what runs at the end is told


def test_seconds_of_earlier_runs_count(setup, tmp_path):
    session = limited(setup, tmp_path, 1000.0)
    with pytest.raises(KeyboardInterrupt):
        searched(session, SleepingExecutor(3, stop_after=2))
    seconds = elapsed_seconds(session.log.trials)
    assert 0.2 <= seconds < sum(trial.result.seconds for trial in session.log.trials) + 5
    executor = SleepingExecutor(3)
    searched(limited(setup, tmp_path, seconds), executor)
    assert not executor.submitted


def test_seconds_without_a_clock_are_added_up():
    trials = [Trial.from_dict(TRIAL | {"result": result}) for result in RESULTS]
    assert elapsed_seconds(trials[:2]) == 7.0
    assert elapsed_seconds(trials) == 7.0 + 2.5
    assert elapsed_seconds([trials[2], *trials[:2]]) == 7.0  # the clock went on from the first one's 2.5 seconds
    assert elapsed_seconds([]) == 0.0


RESULT = {"status": "completed", "loss": 1.0, "sequence_losses": [], "metrics": {}, "error": None}
RESULTS = [
    RESULT | {"seconds": 5.0, "ended_seconds": 5.0},
    RESULT | {"seconds": 6.0, "ended_seconds": 7.0},
    RESULT | {"seconds": 2.5},  # of a log that was written before there was a clock
]
TRIAL = {
    "number": 0,
    "origin": "baseline",
    "plan": {
        "layers": {"a": [4, 4]},
        "shapes": {"a": [8, 8]},
        "quantizer": {"backend": "native", "group_size": 64},
        "initialization": "zero",
    },
    "fidelity": {"num_steps": 8, "num_eval_sequences": 4},
    "total_bytes": 1,
    "cost": 1.0,
}
