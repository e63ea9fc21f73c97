import math

import numpy as np
import pytest

from peft_autoqra.importance.allocation import allocate
from peft_autoqra.search.bayesopt import Observation, TrustRegionSettings, TrustRegionStage
from tests.search.synthetic import InteractingTruth, make_problem


def run(stage, truth, batch_size=2, standard_error=None):
    while not stage.is_done:
        stage.tell([(candidate, truth(candidate), standard_error) for candidate in stage.ask(batch_size)])
    return stage


def test_improves_on_the_exact_allocation_where_the_proxy_is_wrong():
    gains = []
    for seed in range(3):
        problem = make_problem(16, seed, budget_fraction=0.6)
        truth, best = InteractingTruth(problem, seed), allocate(problem)
        settings = TrustRegionSettings(num_trials=12, seed=seed)
        stage = run(TrustRegionStage(problem, settings, [(best, truth(best), None)]), truth)
        gains.append(truth(best) - truth(stage.incumbent))
    assert min(gains) >= 0
    assert sum(gain > 1e-3 for gain in gains) >= 2


def test_starts_from_the_exact_allocation_when_nothing_is_known():
    problem = make_problem(8)
    stage = TrustRegionStage(problem, TrustRegionSettings())
    assert stage.incumbent is None
    assert allocate(problem) in stage.ask(1)


def test_candidates_lie_in_the_trust_region():
    problem = make_problem(16, seed=2, budget_fraction=0.6)
    truth = InteractingTruth(problem)
    best = allocate(problem)
    known = [best, *list(problem.space.neighbors(best))[:6]]
    observations = [Observation(c, truth(c)) for c in known if problem.is_feasible(c)]
    stage = TrustRegionStage(problem, TrustRegionSettings(initial_length=3), observations)
    centre = np.asarray(stage.incumbent)
    for candidate in stage.ask(3):
        assert np.abs(np.asarray(candidate) - centre).sum() <= 3


def test_noisy_losses_with_known_errors():
    problem = make_problem(12, seed=1, budget_fraction=0.6)
    truth, best = InteractingTruth(problem, noise=0.01), allocate(problem)
    stage = TrustRegionStage(problem, TrustRegionSettings(num_trials=12), [(best, truth(best), 0.01)])
    run(stage, truth, standard_error=0.01)
    clean = InteractingTruth(problem)
    assert clean(stage.incumbent) <= clean(best) + 0.02


def test_infeasible_observations_teach_but_are_no_incumbents():
    problem = make_problem(8)
    top = problem.space.uniform(16, 64)
    stage = TrustRegionStage(problem, TrustRegionSettings(), [(top, 0.1, None)])
    assert stage.incumbent is None
    assert all(problem.is_feasible(candidate) for candidate in stage.ask(3))


def test_asks_while_others_are_pending():
    problem = make_problem(12, seed=1, budget_fraction=0.6)
    stage = TrustRegionStage(problem, TrustRegionSettings(num_trials=12))
    truth = InteractingTruth(problem)
    stage.tell([(candidate, truth(candidate), None) for candidate in stage.ask(6)])
    first, second = stage.ask(2), stage.ask(2)
    assert len({*first, *second}) == 4
    counters = stage.state
    stage.tell([(first[0], math.nan, None)])
    assert stage.state == counters  # the batch is not over


def test_collapsed_region_ends_the_stage():
    problem = make_problem(12, seed=1, budget_fraction=0.6)
    settings = TrustRegionSettings(num_trials=100, initial_length=1, failure_tolerance=1, improvement_tolerance=0.0)
    best = allocate(problem)
    stage = run(TrustRegionStage(problem, settings, [(best, 1.0, None)]), lambda _: 2.0, batch_size=1)
    assert stage.state.restart_triggered
    assert stage.incumbent == best


@pytest.mark.parametrize("wrong", [(((9, 9),), 1.0, None), (((0, 0),) * 8, 1.0, -1.0)])
def test_impossible_results_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must not be negative|not on the ladders"):
        TrustRegionStage(make_problem(8), TrustRegionSettings()).tell([wrong])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="must"):
        TrustRegionSettings(num_trials=-1)
    with pytest.raises(ValueError, match="must"):
        TrustRegionSettings(initial_length=0)
