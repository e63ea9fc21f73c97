"""Losses that are not in nats: of another scale, coarse, and often equal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from peft_autoqra.importance.warm_starts import best_allocation, best_uniform
from peft_autoqra.search.engine import SearchEngine
from peft_autoqra.search.ledger import Outcome
from peft_autoqra.search.spending import plan_spending
from peft_autoqra.search.surrogate import PromotionSurrogate
from tests.search.searching import run
from tests.search.synthetic import InteractingTruth, make_problem
from tests.search.test_proxy_gp import fit, observed, problem_of_ten, sample

NUM_QUESTIONS = 64


class Questions:
    """Each is answered right by plans whose loss is low enough; the loss is the negative accuracy."""

    def __init__(self, problem, shift=0.0) -> None:
        """Half of them are answered right by the exact allocation, if they are not shifted."""
        self.truth = InteractingTruth(problem, seed=0)
        middle = self.truth(best_allocation(problem)) + shift
        self.thresholds = np.linspace(middle - 0.3, middle + 0.3, NUM_QUESTIONS)

    def __call__(self, request) -> Outcome:
        values = -(self.truth(request.arm) < self.thresholds).astype(float)
        return Outcome(float(values.mean()), tuple(values.tolist()))


def search(problem, evaluate, total=10.0, costs=(0.02, 0.3, 1.0)):
    engine = SearchEngine(problem, plan_spending(costs, total), seed=0, in_nats=False)
    return engine, run(engine, evaluate)


@pytest.fixture(scope="module")
def problem():
    return make_problem(6, seed=1, budget_fraction=0.5, bit_choices=(2, 3, 4), rank_choices=(0, 8, 16))


def test_an_accuracy_is_improved_on():
    problem = make_problem(16, seed=0)
    questions = Questions(problem)
    engine, _ = search(problem, questions, total=14.0, costs=(0.02, 1.0))
    found, allocation = engine.decision().winner, best_allocation(problem)
    assert engine.ledger.loss(found, 1) < engine.ledger.loss(allocation, 1)
    assert questions.truth(found) < questions.truth(allocation) - 0.02


@pytest.mark.parametrize("shift", [50.0, -50.0])
def test_where_all_are_equal_a_plan_that_needs_no_search_wins(problem, shift):
    """All questions answered, or none."""
    engine, _ = search(problem, Questions(problem, shift))
    assert engine.decision().winner in (best_allocation(problem), best_uniform(problem))


def test_a_search_does_not_depend_on_the_scale_of_the_losses(problem):
    """As it would, were they taken for nats."""
    truth = InteractingTruth(problem, seed=0)

    def scaled(factor):
        def evaluate(request):
            rng = np.random.default_rng(5)
            values = factor * (truth(request.arm) + rng.normal(size=8))
            return Outcome(float(values.mean()), tuple(values.tolist()))

        return evaluate

    asked = [search(problem, scaled(2.0**power))[1] for power in (0, 10)]
    assert [request.arm for request in asked[0]] == [request.arm for request in asked[1]]


def test_posterior_scales_with_the_losses():
    problem = problem_of_ten()
    data = replace(observed(problem, standard_errors=np.full(12, 0.01)), in_nats=False)
    scaled = replace(data, losses=256 * data.losses, standard_errors=256 * data.standard_errors)
    new = sample(problem, 20, seed=9)
    (mean, deviation), (scaled_mean, scaled_deviation) = (fit(problem, one).posterior(new) for one in (data, scaled))
    np.testing.assert_allclose(scaled_mean, 256 * mean, rtol=1e-9)
    np.testing.assert_allclose(scaled_deviation, 256 * deviation, rtol=1e-9)
    np.testing.assert_allclose(
        fit(problem, data).corrected_table(), fit(problem, scaled).corrected_table(), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("standard_errors", [None, np.zeros(12), np.full(12, 0.05)])
def test_equal_accuracies_do_not_break_the_model(standard_errors):
    problem = problem_of_ten()
    data = replace(observed(problem, losses=np.full(12, -0.5), standard_errors=standard_errors), in_nats=False)
    gp, new = fit(problem, data), sample(problem, 20, seed=9)
    mean, deviation = gp.posterior(new)
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()
    assert np.isfinite(gp.log_expected_improvement(new, -0.5)).all()
    np.testing.assert_allclose(mean, -0.5, atol=0.3)


def test_equal_accuracies_are_promoted_by_score(problem):
    rng = np.random.default_rng(0)
    pool = [problem.space.sample(rng) for _ in range(12)]
    surrogate = PromotionSurrogate(problem, seed=0)
    promoted = surrogate.promote([(candidate, -0.5) for candidate in pool], 4)
    assert promoted == sorted(set(pool), key=problem.predicted_loss)[:4]
