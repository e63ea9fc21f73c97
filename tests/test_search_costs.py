from dataclasses import replace

import pytest

from peft_autoqra.search_costs import SearchCosts, fit_tokens
from peft_autoqra.trial import Fidelity

COSTS = SearchCosts(full_steps=100, step_tokens=1000.0, eval_tokens=50.0, calibration_tokens=2000.0, fit_tokens=3000.0)


def test_a_full_fine_tune_costs_one():
    assert COSTS.steps(100) == 1
    assert COSTS.trial(Fidelity(100, 0)) == 1


def test_scoring_costs_half_of_training_on_as_many_tokens():
    assert COSTS.scoring(20) == pytest.approx(0.5 * COSTS.steps(1))  # 20 sequences have the tokens of one step


def test_a_trial_is_trained_and_scored():
    assert COSTS.trial(Fidelity(10, 20)) == pytest.approx(0.1 + 0.005)
    assert COSTS.trial(Fidelity(0, 20)) == COSTS.scoring(20)


def test_calibration_passes_its_tokens_two_and_a_half_times_and_fits():
    assert COSTS.calibration == pytest.approx((2.5 * 2000 + 3000) / 100_000)
    assert replace(COSTS, full_steps=200).calibration == COSTS.calibration / 2


def test_fits_cost_more_for_larger_weights_and_more_bits():
    # one weight of 64 x 32: 12 * 64 * 32 * 32 operations per bit-width, 4 * 64 * 32 per training token
    assert fit_tokens([(64, 32)], 1) == pytest.approx(12 * 32 / 4)
    assert fit_tokens([(64, 32)] * 5, 3) == pytest.approx(3 * fit_tokens([(64, 32)], 1))
    assert fit_tokens([(32, 64)], 2) == fit_tokens([(64, 32)], 2)
