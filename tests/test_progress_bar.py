"""What a person sees of a search: a bar on a terminal, lines in a log, and nothing in a pipe."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import select
import struct
import termios
from contextlib import contextmanager, redirect_stderr

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from peft_autoqra import progress_bar, progress_log
from peft_autoqra.progress_bar import ProgressBar
from peft_autoqra.progress_log import ProgressLog
from peft_autoqra.terminal_bar import terminal_bar
from tests.tiny_progress import make_progress, make_trial

TRIALS = [make_trial(0, 4.0, origin="baseline"), *(make_trial(number, 4.0 - 0.1 * number) for number in range(1, 4))]


def _terminal() -> tuple[int, int]:
    """Both ends of one that is 120 columns wide."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    return reading, writing


def _drawn(make_ends) -> str:
    """What a search that was interrupted draws on standard error."""
    reading, writing = make_ends()
    with os.fdopen(writing, "w") as stream, redirect_stderr(stream):
        bar = ProgressBar()
        bar.on_search_begin(make_progress(*TRIALS[:2]))
        bar.on_trial_begin(TRIALS[2], make_progress(*TRIALS[:2], num_running=1))
        bar.on_trial_end(TRIALS[2], make_progress(*TRIALS[:3]))
        bar.on_search_end(None, make_progress(*TRIALS[:3]))
        stream.flush()
        drawn = _available(reading)
    os.close(reading)
    return drawn


def _available(reading: int) -> str:
    content = b""
    while select.select([reading], [], [], 0)[0] and (piece := os.read(reading, 4096)):
        content += piece
    return content.decode()


@contextmanager
def _switched_off(switch_off, switch_on):
    switch_off()
    try:
        yield
    finally:
        switch_on()


def test_terminal_shows_share_of_cost_time_left_and_best_loss():
    drawn = _drawn(_terminal)
    assert "searching:  20%|" in drawn
    assert re.search(r"searching:  25%\|.*\| 00:00, 2 min 30 s left, best 3.8000 \(baseline 4.0000\), 3 trials", drawn)


def test_pipe_gets_nothing(capfd):
    assert _drawn(os.pipe) == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("switch_off", "switch_on"),
    [
        (disable_progress_bars, enable_progress_bars),
        (lambda: disable_progress_bars("peft_autoqra"), lambda: enable_progress_bars("peft_autoqra")),
        (transformers_logging.disable_progress_bar, transformers_logging.enable_progress_bar),
    ],
)
def test_switches_of_the_ecosystem_are_respected(switch_off, switch_on):
    with _switched_off(switch_off, switch_on):
        assert _drawn(_terminal) == ""


def test_a_finished_search_fills_the_bar():
    reading, writing = _terminal()
    with os.fdopen(writing, "w") as stream, redirect_stderr(stream):
        bar = ProgressBar()
        bar.on_search_begin(make_progress(*TRIALS[:2]))
        bar.on_search_end(object(), make_progress(*TRIALS))
        stream.flush()
        end = _available(reading).rpartition("searching: 100%|")[2]
        assert "trials" in end
        assert " left" not in end
    os.close(reading)


def test_the_clock_goes_on_while_a_trial_takes_long(monkeypatch):
    monkeypatch.setattr(progress_bar, "_TICK_SECONDS", 0.01)
    reading, writing = _terminal()
    with os.fdopen(writing, "w") as stream, redirect_stderr(stream):
        bar = ProgressBar()
        bar.on_search_begin(make_progress(TRIALS[0]))
        _available(reading)
        assert select.select([reading], [], [], 5.0)[0]  # drawn again, although nothing happened
        bar.on_search_end(None, make_progress(TRIALS[0]))
    os.close(reading)


def test_bars_of_calibration_are_as_quiet(capfd):
    assert list(terminal_bar([1, 2], "calibrating")) == [1, 2]
    assert capfd.readouterr() == ("", "")
    reading, writing = _terminal()
    with os.fdopen(writing, "w") as stream, redirect_stderr(stream):
        assert list(terminal_bar([1, 2], "calibrating", show=False)) == [1, 2]
        stream.flush()
        assert _available(reading) == ""
        assert list(terminal_bar([1, 2], "calibrating")) == [1, 2]
        stream.flush()
        assert "calibrating: 100%" in _available(reading)
    os.close(reading)


def test_log_has_a_line_for_every_stage_and_now_and_then_one_more(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="peft_autoqra")
    log = ProgressLog()
    log.on_search_begin(make_progress())
    for number, trial in enumerate(TRIALS):
        log.on_trial_begin(trial, make_progress(*TRIALS[:number], num_running=1))
        log.on_trial_end(trial, make_progress(*TRIALS[: number + 1]))
    monkeypatch.setattr(progress_log, "LOG_SECONDS", 0.0)
    log.on_trial_end(TRIALS[3], make_progress(*TRIALS))
    log.on_search_end(None, make_progress(*TRIALS))
    assert [record.getMessage() for record in caplog.records] == [
        "searching: 10%, cost 0.20 of 2, 0 trials",
        "baseline: 10%, cost 0.20 of 2, 0 trials",
        "evolution: 15%, cost 0.30 of 2, 2 min 50 s left, best 4.0000, 1 trial",
        "evolution: 30%, cost 0.60 of 2, 2 min 20 s left, best 3.7000 (baseline 4.0000), 4 trials",
        "search stopped: 30%, cost 0.60 of 2, 2 min 20 s left, best 3.7000 (baseline 4.0000), 4 trials",
    ]
