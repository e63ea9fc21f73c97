import math

import pytest

from peft_autoqra.search.trust_region import TrustRegionState, update_state


def test_grows_after_successes_in_a_row_up_to_the_maximum():
    state = TrustRegionState(length=8, max_length=20, best_loss=10.0, success_tolerance=2)
    lengths = []
    for loss in (9, 8, 7, 6):
        state = update_state(state, [loss])
        lengths.append(state.length)
    assert lengths == [8, 16, 16, 20]
    assert state.best_loss == 6


def test_shrinks_after_failures_in_a_row_and_asks_for_a_restart():
    state = TrustRegionState(length=2, min_length=1, best_loss=1.0, failure_tolerance=2)
    for _ in range(3):
        state = update_state(state, [1.0, math.inf])
        assert not state.restart_triggered
    assert update_state(state, [2.0]).restart_triggered


def test_a_success_between_resets_the_failures():
    state = TrustRegionState(best_loss=1.0, failure_tolerance=2)
    for losses in ([1.0], [0.5], [0.5]):
        state = update_state(state, losses)
    assert (state.length, state.failure_counter, state.success_counter) == (8.0, 1, 0)


def test_improvements_below_the_tolerance_are_failures_but_are_kept():
    state = update_state(TrustRegionState(best_loss=1.0), [1.0 - 1e-5], min_improvement=1e-4)
    assert state.failure_counter == 1
    assert state.best_loss == 1.0 - 1e-5


def test_an_empty_batch_changes_nothing():
    state = TrustRegionState()
    assert update_state(state, []) is state


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": 9, "max_length": 8}, {"success_tolerance": 0}])
def test_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match="must be"):
        TrustRegionState(**wrong)
