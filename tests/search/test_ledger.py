import math

import pytest

from peft_autoqra.paired import paired_difference
from peft_autoqra.search.ledger import Ledger, Outcome, Request

FIRST, SECOND = ((0, 0),), ((1, 0),)


def told(*outcomes):
    """A ledger with (arm, level, seed, variant, loss, sequence losses)."""
    ledger = Ledger((0.1, 1.0), 10.0)
    for arm, level, seed, variant, *outcome in outcomes:
        request = Request(arm, level, "evolution", seed, variant)
        ledger.book(request)
        ledger.record(request, Outcome(*outcome))
    return ledger


def test_spends_up_to_the_total():
    ledger = Ledger((0.25, 1.0), 2.5)
    assert ledger.num_affordable(0) == 10
    assert ledger.num_affordable(1) == 2
    ledger.book(Request(FIRST, 1, "baseline"))
    ledger.book(Request(SECOND, 1, "baseline"))
    assert ledger.affords(0)
    assert not ledger.affords(1)
    assert not ledger.affords(0, reserve=(0.5, 1))
    assert ledger.spent == 2.0


def test_ten_tenths_are_one():
    ledger = Ledger((0.1,), 1.0)
    num = 0
    while ledger.affords(0):
        assert ledger.num_affordable(0) == 10 - num
        ledger.book(Request(((num, 0),), 0, "evolution"))
        num += 1
    assert num == 10


def test_counts_trials():
    ledger = Ledger((1.0,), 100.0, max_trials=3)
    assert ledger.affords(0, reserve=(0.0, 2))
    assert not ledger.affords(0, reserve=(0.0, 3))
    for seed in range(3):
        assert ledger.num_affordable(0) == 3 - seed
        ledger.book(Request(FIRST, 0, "baseline", seed))
    assert not ledger.affords(0)


def test_an_evaluation_is_known_by_arm_level_seed_and_variant():
    ledger = told((FIRST, 1, 0, 0, 1.0))
    assert ledger.was_asked(Request(FIRST, 1, "other origin"))
    for other in (
        Request(SECOND, 1, ""),
        Request(FIRST, 0, ""),
        Request(FIRST, 1, "", 1),
        Request(FIRST, 1, "", 0, 1),
    ):
        assert not ledger.was_asked(other)
    assert ledger.outcome(FIRST, 1) == Outcome(1.0)
    assert ledger.outcome(FIRST, 0) is None


def test_loss_is_the_mean_of_the_seeds_and_infinite_where_one_failed():
    ledger = told((FIRST, 1, 0, 0, 1.0), (FIRST, 1, 1, 0, 2.0), (SECOND, 1, 0, 0, 1.0), (SECOND, 1, 1, 0, None))
    assert ledger.loss(FIRST, 1) == 1.5
    assert ledger.loss(SECOND, 1) == math.inf
    assert ledger.loss(FIRST, 0) == math.inf
    assert ledger.num_seeds(FIRST, 1) == 2
    assert ledger.arms(1) == [FIRST]
    assert ledger.candidates(1) == [FIRST, SECOND]


def test_plans_by_name_are_arms_but_no_candidates():
    ledger = told(("outside", 1, 0, 0, 1.0), (FIRST, 1, 0, 0, 1.0))
    assert ledger.arms(1) == ["outside", FIRST]
    assert ledger.candidates(1) == [FIRST]


def test_the_best_learning_rate():
    ledger = told((FIRST, 1, 0, 0, 1.0), (FIRST, 1, 0, 1, 0.5), (FIRST, 1, 0, 2, None), (SECOND, 1, 0, 0, 1.0))
    assert ledger.best_variant(FIRST, 1, 3) == 1
    assert ledger.best_variant(SECOND, 1, 3) == 0


def test_differences_are_paired_over_common_seeds():
    rows = {
        (FIRST, 0): (1.0, 2.0, 3.0),
        (FIRST, 1): (1.5, 2.0, 3.5),
        (FIRST, 2): (9.0, 9.0, 9.0),
        (SECOND, 0): (1.2, 2.3, 3.1),
        (SECOND, 1): (1.4, 2.9, 3.9),
    }
    ledger = told(*((arm, 1, seed, 0, sum(row) / 3, row) for (arm, seed), row in rows.items()))
    expected = paired_difference(
        [rows[FIRST, 0], rows[FIRST, 1]],
        [rows[SECOND, 0], rows[SECOND, 1]],
    )
    assert ledger.difference(FIRST, SECOND, 1) == expected
    assert ledger.difference(FIRST, SECOND, 0) is None


def test_a_failed_seed_leaves_no_difference():
    ledger = told((FIRST, 1, 0, 0, 1.0), (SECOND, 1, 0, 0, math.nan))
    assert ledger.difference(FIRST, SECOND, 1) is None


def test_losses_without_sequences_count_as_exact():
    ledger = told((FIRST, 1, 0, 0, 1.0), (SECOND, 1, 0, 0, 1.25))
    difference = ledger.difference(FIRST, SECOND, 1)
    assert difference.interval == pytest.approx((-0.25, -0.25))
