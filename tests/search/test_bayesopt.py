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


@pytest.fixture(scope="module")
def collapsed():
    """A stage whose every candidate was worse than what it knew, until its region collapsed."""
    problem = make_problem(12, seed=1, budget_fraction=0.6)
    settings = TrustRegionSettings(num_trials=6, initial_length=1, failure_tolerance=1, improvement_tolerance=0.0)
    best = allocate(problem)
    known = [c for c in problem.space.neighbors(best) if problem.is_feasible(c)][:5]
    stage = TrustRegionStage(problem, settings, [(best, 1.0, None), *((c, 1.5, None) for c in known)])
    return problem, run(stage, lambda _: 2.0, batch_size=1)


def test_a_collapsed_region_is_followed_by_another(collapsed):
    problem, stage = collapsed
    assert stage.num_restarts > 0
    assert stage.num_asked == 6
    assert stage.incumbent == allocate(problem)


def test_the_centre_follows_an_improvement_in_the_new_region(collapsed):
    problem, stage = collapsed
    assert stage._centre() != stage.incumbent
    better = problem.smallest_candidate()
    stage._pending.append(better)
    stage.tell([(better, 0.5, None)])
    assert stage._centre() == stage.incumbent == better


def test_other_fidelities_teach_but_are_no_incumbents():
    problem = make_problem(12, seed=1, budget_fraction=0.6)
    truth, best = InteractingTruth(problem), allocate(problem)
    cheap = [c for c in [best, *problem.space.neighbors(best)] if problem.is_feasible(c)][:8]
    stage = TrustRegionStage(problem, TrustRegionSettings(), [Observation(c, truth(c) - 1, None, 1) for c in cheap])
    assert stage.incumbent is None
    stage.tell([Observation(best, truth(best))])
    assert stage.incumbent == best
    (candidate,) = stage.ask()
    assert candidate != best  # known here; all others may be asked for, also those known at the other fidelity
    assert stage.state.best_loss == truth(best)


def test_hyperparameters_are_fitted_when_there_is_a_fifth_more():
    problem = make_problem(12, seed=1, budget_fraction=0.6)
    truth = InteractingTruth(problem)
    stage = TrustRegionStage(problem, TrustRegionSettings(num_trials=20, improvement_tolerance=0.0))
    stage.tell([(candidate, truth(candidate), None) for candidate in stage.ask(10)])
    fitted = []
    for _ in range(4):
        batch = stage.ask()
        fitted.append((len(stage._usable()), stage._num_fitted))
        stage.tell([(candidate, truth(candidate), None) for candidate in batch])
    assert fitted == [(10, 10), (11, 10), (12, 12), (13, 12)]


def test_a_pool_is_all_that_is_proposed():
    problem, rng = make_problem(8, seed=1, budget_fraction=0.6, bit_choices=(2, 3, 4)), np.random.default_rng(0)
    pool = [c for c in dict.fromkeys(problem.space.sample(rng) for _ in range(300)) if problem.is_feasible(c)][:9]
    assert len(pool) == 9
    settings = TrustRegionSettings(num_trials=20, improvement_tolerance=0.0)
    stage, truth, asked = TrustRegionStage(problem, settings, pool=pool), InteractingTruth(problem), []
    while not stage.is_done:
        batch = stage.ask(3)
        asked += batch
        stage.tell([(candidate, truth(candidate), None) for candidate in batch])
    assert sorted(asked) == sorted(pool)


@pytest.mark.parametrize("wrong", [(((9, 9),), 1.0, None), (((0, 0),) * 8, 1.0, -1.0)])
def test_impossible_results_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must not be negative|not on the ladders"):
        TrustRegionStage(make_problem(8), TrustRegionSettings()).tell([wrong])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="must"):
        TrustRegionSettings(num_trials=-1)
    with pytest.raises(ValueError, match="must"):
        TrustRegionSettings(initial_length=0)
