"""Calls that hang are stopped, in every thread, and nothing of the limit is left afterwards."""

import signal
import threading
import time
from functools import partial

import pytest

from peft_autoqra.evaluation.time_limit import TimeLimitExceeded, call_within

SHORT = 0.05
SIGNALS = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals that reach one thread")


def hang_in_python():
    while True:
        pass


def hang_among_handlers():
    while True:
        try:
            hang_in_python()
        except Exception:
            continue


def hang_in_sleep():
    time.sleep(60)


def hang_in_lock():
    threading.Event().wait(60)


def in_thread(function):
    """What a function raises or returns in another thread."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


@pytest.fixture
def no_handler():
    """As in a user's process; pytest-timeout has a handler of its own."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    signal.signal(signal.SIGALRM, before)


@SIGNALS
@pytest.mark.usefixtures("no_handler")
def test_a_sleep_is_cut_short_where_nobody_handles_the_signal():
    start = time.perf_counter()
    with pytest.raises(TimeLimitExceeded):
        call_within(SHORT, hang_in_sleep)
    assert time.perf_counter() - start < 5


@SIGNALS
@pytest.mark.parametrize("hang", [hang_in_python, hang_among_handlers, hang_in_sleep, hang_in_lock])
def test_a_hang_is_stopped(hang):
    before, start = signal.getsignal(signal.SIGALRM), time.perf_counter()
    with pytest.raises(TimeLimitExceeded, match=r"longer than 0\.05 seconds"):
        call_within(SHORT, hang)
    assert time.perf_counter() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize("hang", [hang_in_python, hang_among_handlers])
def test_a_hang_in_another_thread_is_stopped(hang):
    assert isinstance(in_thread(lambda: call_within(SHORT, hang)), TimeLimitExceeded)


def test_a_call_that_returns_late_has_failed():
    late = in_thread(lambda: call_within(SHORT, lambda: time.sleep(4 * SHORT)))
    assert isinstance(late, TimeLimitExceeded)


@SIGNALS
def test_one_swallowed_interruption_is_repeated():
    def swallow():
        try:
            hang_in_python()
        except BaseException:
            hang_in_python()

    with pytest.raises(TimeLimitExceeded):
        call_within(SHORT, swallow)


def test_clean_up_outside_runs_to_its_end():
    cleaned = []

    def clean_up_afterwards():
        try:
            call_within(SHORT, hang_in_python)
        finally:
            cleaned.extend(range(100_000))

    with pytest.raises(TimeLimitExceeded):
        clean_up_afterwards()
    assert len(cleaned) == 100_000


@pytest.mark.parametrize("run", [lambda function: function(), in_thread])
def test_calls_that_end_near_the_limit_never_raise_later(run):
    def work(wait_seconds):
        end = time.perf_counter() + wait_seconds
        while time.perf_counter() < end:
            pass

    def many():
        num_late = 0
        for wait_seconds in (0.0005, 0.001, 0.002, 0.03) * 10:
            try:
                call_within(0.001, partial(work, wait_seconds))
            except TimeLimitExceeded:
                num_late += 1
        return num_late

    assert run(many) >= 10  # those of 0.03 at least


def test_results_and_other_errors_pass():
    assert call_within(60, lambda: 1) == call_within(None, lambda: 1) == 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with pytest.raises(KeyboardInterrupt):
        call_within(60, partial(signal.raise_signal, signal.SIGINT))


@pytest.mark.parametrize("run", [lambda function: function(), in_thread])
def test_the_shorter_of_nested_limits_holds(run):
    def inner(seconds):
        try:
            call_within(seconds, hang_in_python)
        except TimeLimitExceeded:
            return "inner"

    def outer(seconds, inner_seconds):
        try:
            return call_within(seconds, partial(inner, inner_seconds))
        except TimeLimitExceeded:
            return "outer"

    assert run(partial(outer, SHORT, 60)) == "outer"
    assert run(partial(outer, 60, SHORT)) == "inner"


@SIGNALS
def test_the_alarm_of_others_reaches_their_handler():
    received = []

    def wait():
        while not received:
            time.sleep(SHORT)

    before = signal.signal(signal.SIGALRM, lambda *_: received.append("alarm"))
    timer = signal.setitimer(signal.ITIMER_REAL, SHORT)  # pytest-timeout's, where it is in use
    try:
        call_within(60, wait)
        with pytest.raises(TimeLimitExceeded):
            call_within(SHORT, hang_in_sleep)
        assert received == ["alarm"]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
