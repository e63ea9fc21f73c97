import logging
import math

import numpy as np
import pytest

from peft_autoqra.search.surrogate import PromotionSurrogate, rank_correlation
from tests.search.synthetic import InteractingTruth, make_problem


@pytest.fixture
def problem():
    return make_problem(16, seed=1, budget_fraction=0.6)


def candidates_of(problem, num, seed=0):
    rng = np.random.default_rng(seed)
    return [problem.space.sample(rng) for _ in range(num)]


def expensive_from(problem, cheap):
    """Training repairs what few bits cost where rank is high: systematic, and invisible to the cheap loss."""

    def expensive(candidate):
        return cheap[candidate] - 2.0 * np.asarray(candidate)[:, 1].mean()

    return expensive


def test_falls_back_to_the_cheap_loss_with_few_results(problem):
    surrogate = PromotionSurrogate(problem)
    pool = [(candidate, float(index)) for index, candidate in enumerate(candidates_of(problem, 6))]
    surrogate.fit([(candidate, loss, -loss) for candidate, loss in pool[:3]])
    assert surrogate.predict(pool) == [loss for _, loss in pool]
    assert surrogate.promote(pool, 2) == [pool[3][0], pool[4][0]]


def test_learns_what_the_cheap_loss_misses_and_logs_it(problem, caplog):
    truth = InteractingTruth(problem, mis_scoring=0.0)
    known, new = candidates_of(problem, 20), candidates_of(problem, 60, seed=1)
    cheap = {candidate: truth(candidate) for candidate in (*known, *new)}
    expensive = expensive_from(problem, cheap)
    surrogate = PromotionSurrogate(problem)
    with caplog.at_level(logging.INFO, logger="peft_autoqra.search.surrogate"):
        surrogate.fit([(candidate, cheap[candidate], expensive(candidate)) for candidate in known])
    assert str(surrogate.check) in caplog.text
    assert surrogate.check.is_used
    assert surrogate.check.rank_correlation > surrogate.check.cheap_rank_correlation
    actual = np.array([expensive(candidate) for candidate in new])
    predicted = np.array(surrogate.predict([(candidate, cheap[candidate]) for candidate in new]))
    alone = np.array([cheap[candidate] for candidate in new])
    assert rank_correlation(predicted, actual) > rank_correlation(alone, actual) + 0.05


def test_pure_noise_is_not_believed(problem):
    rng = np.random.default_rng(0)
    pool = [(candidate, float(index)) for index, candidate in enumerate(candidates_of(problem, 12))]
    surrogate = PromotionSurrogate(problem)
    surrogate.fit([(candidate, loss, loss + 0.01 * rng.normal()) for candidate, loss in pool])
    assert surrogate.predict(pool) == [loss for _, loss in pool]


def test_failed_and_known_candidates_are_not_promoted(problem):
    first, second, third, fourth = candidates_of(problem, 4)
    surrogate = PromotionSurrogate(problem)
    surrogate.fit([(first, 1.0, None), (second, None, None)])
    pool = [(first, 1.0), (second, math.nan), (third, None), (fourth, 5.0), (fourth, 5.0)]
    assert surrogate.promote(pool, 4) == [fourth]
    assert surrogate.predict([(third, None), (third, math.nan)]) == [math.inf, math.inf]
    assert surrogate.promote([], 3) == []


def test_huge_equal_losses_fall_back(problem):
    pool = [(candidate, 1e30) for candidate in candidates_of(problem, 6)]
    surrogate = PromotionSurrogate(problem)
    surrogate.fit([(candidate, loss, loss) for candidate, loss in pool])
    assert surrogate.predict(pool) == [1e30] * 6


def test_is_deterministic(problem):
    truth = InteractingTruth(problem)
    results = [(c, truth(c), truth(c) + 0.1 * len(set(c))) for c in candidates_of(problem, 10)]
    pool = [(c, truth(c)) for c in candidates_of(problem, 20, seed=3)]
    predictions = []
    for _ in range(2):
        surrogate = PromotionSurrogate(problem, seed=4)
        surrogate.fit(results)
        predictions.append(surrogate.predict(pool))
    assert predictions[0] == predictions[1]


def test_rank_correlation_of_a_constant_is_zero():
    assert rank_correlation(np.ones(4), np.arange(4.0)) == 0.0
    assert rank_correlation(np.arange(4.0) ** 3, np.arange(4.0)) == pytest.approx(1.0)
