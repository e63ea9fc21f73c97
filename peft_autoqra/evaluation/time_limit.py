"""A limit on the wall-clock time of a call, also of one that hangs."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
_REPEAT_SECONDS = 1.0  # an exception that a destructor or an ``except BaseException`` swallowed is raised again


class TimeLimitExceeded(TimeoutError):
    """A call took longer than it may."""


def call_within(seconds: float | None, function: Callable[[], T]) -> T:
    """Call a function, and end it with an exception when it takes longer.

    Inside the function the end comes as a ``BaseException``, because libraries handle every ``Exception`` of, for
    example, a data set's row. It is raised between two Python instructions of the thread that calls. In the main
    thread of a POSIX system that includes sleeping and waiting, which a signal cuts short; elsewhere such a call must
    return first. What nothing stops is one call into C that does not return, such as a kernel that loops; where it
    returns late, the function ends then. Clean-up belongs outside: after this nothing is raised any more, which a
    context manager could not promise, for its end can be interrupted before its first line.

    Handlers and timers of others stay in force: an alarm that is not this one's goes to the handler that was there.

    Args:
        seconds: wall-clock time; None is no limit.
        function: what is called.

    Raises:
        TimeLimitExceeded: the function took longer.
    """  # noqa: DOC501 - what is raised again is that of another limit
    if seconds is None:
        return function()
    alarm = _Alarm(seconds)
    try:
        try:
            try:
                alarm.start()
                result = function()
            finally:
                alarm.stop()
        finally:
            alarm.stop()  # the alarm may have interrupted the line above
    except _TimeIsUp:
        if not alarm.rang:  # that of a limit around this one
            raise
    if alarm.rang:
        raise TimeLimitExceeded(f"it took longer than {seconds:g} seconds")
    return result


class _TimeIsUp(BaseException):
    """Raised inside the function."""


class _Alarm:
    """A thread that waits, and then raises an exception in the thread that made it."""

    def __init__(self, seconds: float) -> None:
        self.rang = False
        self._seconds = seconds
        self._thread_id = threading.get_ident()
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._ring, name="call_within", daemon=True)
        self._pending = False
        self._previous: Callable[[int, FrameType | None], object] | int | None = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._by_signal = (
            in_main_thread
            and hasattr(signal, "pthread_kill")
            # a handler that was not installed from Python could not be put back; the default one is 0, which is false
            and signal.getsignal(signal.SIGALRM) is not None
        )

    def start(self) -> None:
        if self._by_signal:
            self._previous = signal.signal(signal.SIGALRM, self._on_signal)
        self._watch.start()

    def stop(self) -> None:
        """When this returns nothing is raised any more; once more does no harm."""
        self._stopped.set()
        if self._watch.ident is not None:
            self._watch.join()
        if not self._by_signal:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread_id), None)
        elif self._previous is not None:
            signal.signal(signal.SIGALRM, self._previous)  # handles what has arrived before it puts the other back

    def _ring(self) -> None:
        wait_seconds = self._seconds
        while not self._stopped.wait(wait_seconds):
            self.rang = True
            if self._by_signal:
                self._pending = True
                signal.pthread_kill(self._thread_id, signal.SIGALRM)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread_id), ctypes.py_object(_TimeIsUp)
                )
            wait_seconds = _REPEAT_SECONDS

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_ours, self._pending = self._pending, False
        if is_ours:
            if not self._stopped.is_set():
                raise _TimeIsUp
        elif callable(self._previous):
            self._previous(number, frame)
