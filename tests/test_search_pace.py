"""How much of a search is done, and how long the rest will take."""

from __future__ import annotations

import pytest

from peft_autoqra.objective_info import ObjectiveInfo
from peft_autoqra.progress_text import progress_text
from peft_autoqra.search_pace import SearchPace
from tests.tiny_progress import make_progress, make_trial

TRIALS = [make_trial(number, 4.0 - 0.1 * number) for number in range(4)]


def test_nothing_is_known_before_a_trial_has_ended():
    assert SearchPace().seconds_left(make_progress(num_running=1)) is None


def test_time_left_is_the_rest_of_the_cost_at_the_rate_so_far():
    # 2.0 - 0.2 of calibration - 0.4 of trials at 100 seconds each full fine-tune; what is pending is not done
    assert SearchPace().seconds_left(make_progress(*TRIALS, num_running=2)) == pytest.approx(140.0)


def test_trials_side_by_side_take_less_time():
    pace = SearchPace()
    for num in range(1, 5):
        pace.trial_ended(make_progress(*TRIALS[:num], num_running=3))
    assert pace.num_workers == 4
    assert pace.seconds_left(make_progress(*TRIALS)) == pytest.approx(35.0)


def test_the_rate_is_of_all_costs_together():
    trials = [make_trial(0, 4.0, seconds=40.0), *(make_trial(n, 5.0, steps=1, seconds=5.0) for n in range(1, 9))]
    assert SearchPace().seconds_left(make_progress(*trials)) == pytest.approx((2.0 - 0.2 - 0.2) * 80 / 0.2)


def test_the_limit_that_comes_first_counts():
    assert SearchPace().seconds_left(make_progress(*TRIALS, max_trials=6)) == pytest.approx(20.0)
    assert SearchPace().seconds_left(make_progress(*TRIALS, max_seconds=75.0)) == pytest.approx(5.0)
    assert SearchPace().seconds_left(make_progress(*TRIALS, max_seconds=10.0)) == 0.0
    assert make_progress(*TRIALS).fraction == pytest.approx(0.3)
    assert make_progress(*TRIALS, max_trials=5).fraction == pytest.approx(0.8)
    assert make_progress(*TRIALS, max_seconds=70.0).fraction == 1.0


def test_text_has_another_objective_as_people_know_it():
    accuracy = ObjectiveInfo("accuracy", greater_is_better=True)
    progress = make_progress(make_trial(0, -0.5, origin="baseline"), make_trial(1, -0.75), objective=accuracy)
    assert "best accuracy 0.7500 (baseline 0.5000), 2 trials" in progress_text(progress, SearchPace())


def test_text_names_what_is_there():
    baseline = make_trial(0, 3.95, origin="baseline")
    assert progress_text(make_progress(), SearchPace()) == "0 trials"
    alone = progress_text(make_progress(baseline), SearchPace())
    assert alone == "2 min 50 s left, best 3.9500, 1 trial"
    failed = make_trial(5, None)
    text = progress_text(make_progress(baseline, *TRIALS, failed, num_running=2), SearchPace())
    assert text == "2 min 0 s left, best 3.7000 (baseline 3.9500), 6 trials, 2 running, 1 failed"
