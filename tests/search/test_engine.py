import math
from dataclasses import replace

import numpy as np
import pytest

from peft_autoqra.importance.warm_starts import best_allocation, best_uniform
from peft_autoqra.search.engine import SearchEngine
from peft_autoqra.search.ledger import Outcome, Request
from peft_autoqra.search.spending import Spending, plan_spending
from tests.search.searching import Landscape, run
from tests.search.synthetic import make_problem

COSTS = (0.02, 0.3, 1.0)


@pytest.fixture(scope="module")
def problem():
    return make_problem(6, seed=1, budget_fraction=0.5, bit_choices=(2, 3, 4), rank_choices=(0, 8, 16))


def make_engine(problem, total=12.0, costs=COSTS, seed=0, baselines=(), **settings):
    return SearchEngine(problem, plan_spending(costs, total, **settings), seed=seed, baselines=baselines)


@pytest.fixture(scope="module")
def searched(problem):
    """One whole search: engine, requests, landscape."""
    landscape = Landscape(problem, top=2, noise=0.01, seed_noise=0.002, named={"outside": 5.0})
    engine = make_engine(problem, 24.0, baselines=("outside",), num_baselines=3)
    return engine, run(engine, landscape), landscape


def test_costs_keep_the_total_and_nothing_is_asked_twice(searched, problem):
    engine, asked, _ = searched
    assert sum(COSTS[request.level] for request in asked) == pytest.approx(engine.ledger.spent)
    assert 0.8 * 24 < engine.ledger.spent <= 24
    evaluated = [(request.arm, request.level, request.seed, request.variant) for request in asked]
    assert len(set(evaluated)) == len(evaluated)
    assert all(problem.is_feasible(request.arm) for request in asked if request.arm != "outside")
    assert all(problem.is_trainable(request.arm) for request in asked if request.arm != "outside")


def test_baselines_come_first_then_the_stages_in_turn(searched, problem):
    _, asked, _ = searched
    baselines = [best_allocation(problem), best_uniform(problem), "outside"]
    assert [request.arm for request in asked[:3]] == baselines
    assert all(request.level == 2 for request in asked[:3])
    stages = list(dict.fromkeys(request.origin for request in asked))
    assert stages == ["baseline", "allocation", "evolution", "trust_region", "confirmation"]
    assert {request.level for request in asked if request.origin == "evolution"} == {0, 1, 2}
    allocation = {(r.arm, r.level) for r in asked if r.arm == baselines[0] and r.seed == 0}
    assert {level for _, level in allocation} == {0, 1, 2}


def test_the_best_and_the_best_baseline_are_confirmed_with_all_seeds(searched):
    engine, asked, _ = searched
    decision = engine.decision()
    assert decision.num_seeds == 3
    seeds = [request.seed for request in asked if request.arm == decision.best and request.level == 2]
    assert seeds == [0, 1, 2]
    simple = {engine.allocation, engine.uniform, "outside"}
    assert any(engine.ledger.num_seeds(arm, 2) == 3 for arm in simple)


def test_finds_what_is_better_than_the_allocation():
    problem = make_problem(16, seed=0, budget_fraction=0.6)
    engine, landscape = make_engine(problem, 14.0, costs=(0.02, 1.0)), Landscape(problem, top=1)
    run(engine, landscape)
    assert landscape.true_loss(engine.decision().winner) < landscape.true_loss(engine.allocation) - 1e-3


@pytest.mark.parametrize("max_trials", [1, 4, 9, 30])
def test_max_trials_is_kept_and_divided(problem, max_trials):
    engine = make_engine(problem, total=1e4, max_trials=max_trials)
    asked = run(engine, Landscape(problem, top=2))
    assert len(asked) <= max_trials
    assert engine.decision() is not None
    if max_trials == 30:
        assert len(asked) > 20
        origins = [request.origin for request in asked if request.level == 2]
        assert origins.count("trust_region") >= 3
        assert engine.decision().num_seeds == 3


@pytest.mark.parametrize("total", [0.5, 1.0, 2.5, 7.0])
def test_small_totals_are_kept(problem, total):
    engine = make_engine(problem, total=total)
    asked = run(engine, Landscape(problem, top=2, noise=0.01))
    assert sum(COSTS[request.level] for request in asked) <= total * (1 + 1e-9)
    assert (engine.decision() is None) == (total < 1)


@pytest.mark.parametrize("stage", ["warm", "evolution", "fidelities", "surrogate", "trust_region"])
def test_stages_can_be_left_out(problem, stage):
    spending = plan_spending(COSTS, 10.0, max_trials=60).without(stage)
    engine = SearchEngine(problem, spending)
    asked = run(engine, Landscape(problem, top=engine.ledger.top, noise=0.01))
    origins = [request.origin for request in asked]
    levels = len(spending.level_costs)
    assert engine.ledger.spent <= 10.0 * (1 + 1e-9)
    assert len(asked) <= 60
    if stage == "warm":
        assert origins.count("allocation") == levels - 1  # the allocation itself, to compare others with
    if stage == "fidelities":
        assert {request.level for request in asked} == {0}
        assert spending.level_costs == COSTS[-1:]
    if stage == "surrogate":
        assert engine.surrogate_checks == []
    if stage in ("evolution", "trust_region"):
        assert stage not in origins[: origins.index("confirmation")] or stage == "evolution"
    if stage == "evolution":
        assert not any(r.origin == "evolution" and r.level == 0 for r in asked)
    assert engine.decision() is not None


def test_failed_arms_are_not_asked_again_nor_win(problem):
    landscape = Landscape(problem, top=2, noise=0.01)
    fails = best_uniform(problem)

    def evaluate(request):
        broken = request.arm == fails or sum(map(sum, request.arm)) % 4 == 0
        return Outcome(None) if broken else landscape(request)

    engine = make_engine(problem)
    asked = run(engine, evaluate)
    decision = engine.decision()
    assert evaluate(Request(decision.winner, 2, "")).loss is not None
    assert not any(request.origin == "confirmation" and request.arm == fails for request in asked)
    assert len({(r.arm, r.level, r.seed) for r in asked}) == len(asked)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_all_failed_ends_without_a_decision(problem, loss):
    engine = make_engine(problem, total=12.0)
    run(engine, lambda _: Outcome(loss))
    assert engine.decision() is None


def test_a_finalist_that_fails_with_another_seed_does_not_win(problem):
    landscape = Landscape(problem, top=2, noise=0.01)
    engine = make_engine(problem)
    failed = []

    def evaluate(request):
        if request.seed == 1 and not failed:
            failed.append(request.arm)
            return Outcome(None)
        return landscape(request)

    asked = run(engine, evaluate)
    assert engine.decision().winner != failed[0]
    assert not any(request.arm == failed[0] and request.seed == 2 for request in asked)


def decided(problem, losses_of, total=9.0):
    """Two baselines, two candidates of the evolution, and confirmation, at one fidelity."""
    spending = Spending(level_costs=(1.0,), total_cost=total, num_warm=0, num_evolved=2, num_finalists=2)
    engine = SearchEngine(problem, spending)
    simple = {engine.allocation, engine.uniform}
    searched = []

    def evaluate(request):
        if request.arm not in simple and request.arm not in searched:
            searched.append(request.arm)
        which = "simple" if request.arm in simple else f"searched{searched.index(request.arm)}"
        losses = np.asarray(losses_of(which, request.seed))
        return Outcome(float(losses.mean()), tuple(losses.tolist()))

    return engine, run(engine, evaluate), simple, searched


def wiggle(seed):
    return 0.01 * np.random.default_rng(seed).normal(size=8)


def test_a_searched_plan_wins_with_a_margin(problem):
    engine, _, simple, _ = decided(problem, lambda which, seed: 3.0 - 0.1 * (which == "searched0") + wiggle(seed))
    decision = engine.decision()
    assert decision.winner == decision.best not in simple


def test_without_a_margin_the_simpler_plan_wins(problem):
    def losses_of(which, seed):
        return 3.0 - 0.001 * (which == "searched0") + wiggle([seed, which == "searched0"])

    engine, _, simple, searched = decided(problem, losses_of)
    decision = engine.decision()
    assert decision.best == searched[0]
    assert decision.winner in simple
    assert decision.num_seeds == 3


def test_racing_drops_who_is_clearly_worse(problem):
    worse = {"searched0": 0.0, "searched1": 1.0, "simple": 0.5}
    engine, asked, simple, searched = decided(problem, lambda which, seed: 3.0 + worse[which] + wiggle(seed), total=40)
    assert len(searched) == 2
    assert engine.ledger.num_seeds(searched[0], 0) == 3
    assert engine.ledger.num_seeds(searched[1], 0) == 1
    assert sum(engine.ledger.num_seeds(arm, 0) == 3 for arm in simple) == 1  # the best simpler one, for the margin
    assert len([request for request in asked if request.origin == "confirmation"]) == 4


def test_who_has_to_be_compared_gets_all_seeds_where_the_budget_is_short(problem):
    def losses_of(which, seed):  # nobody is clearly worse
        return 3.0 + 0.1 * np.random.default_rng([seed, len(which), which[-1] == "1"]).normal(size=8)

    engine, asked, *_ = decided(problem, losses_of, total=8.0)
    assert engine.decision().num_seeds == 3
    assert len(asked) == 8


def test_learning_rates_of_finalists(problem):
    spending = plan_spending((1.0,), 20.0, num_variants=2)
    engine = SearchEngine(problem, spending)
    landscape = Landscape(problem, top=0, noise=0.001)

    def evaluate(request):
        outcome = landscape(replace(request, variant=0))
        shift = -0.2 * request.variant
        return Outcome(outcome.loss + shift, tuple(loss + shift for loss in outcome.sequence_losses))

    asked = run(engine, evaluate)
    decision = engine.decision()
    assert decision.variant == 1
    assert decision.num_seeds == 3
    assert engine.ledger.spent <= 20
    assert {request.variant for request in asked if request.seed > 0} == {1}
    assert all(request.origin == "confirmation" for request in asked if request.variant)


@pytest.mark.parametrize("num", [1, 3])
def test_equal_asks_for_equal_tells(problem, num):
    runs = []
    for seed in (0, 0, 1):
        engine = make_engine(problem, total=9.0, seed=seed)
        asked = run(engine, Landscape(problem, top=2, noise=0.01), num=num, order=reversed)
        runs.append((asked, engine.decision()))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


def test_results_in_any_order(problem):
    """Four under way all the time, told at random."""
    rng, landscape = np.random.default_rng(0), Landscape(problem, top=2, noise=0.01)
    engine = make_engine(problem, baselines=("outside",), num_baselines=3)
    landscape.named["outside"] = 3.6
    asked = []
    while not engine.is_done:
        asked += engine.ask(4 - len(engine.pending))
        if engine.pending:
            request = engine.pending[rng.integers(len(engine.pending))]
            engine.tell(request, landscape(request))
    assert len({(r.arm, r.level, r.seed, r.variant) for r in asked}) == len(asked)
    assert engine.ledger.spent <= 12
    assert engine.decision().num_seeds == 3


def test_only_what_is_under_way_can_be_told(problem):
    engine = make_engine(problem)
    (request,) = engine.ask()
    assert engine.pending == (request,)
    engine.tell(request, Outcome(3.0))
    for wrong in (request, replace(request, seed=5)):
        with pytest.raises(ValueError, match="was not asked for"):
            engine.tell(wrong, Outcome(3.0))


@pytest.mark.parametrize("after", [0, 1, 8, 30])
def test_finish_leaves_confirmation_only(problem, after):
    engine, landscape = make_engine(problem), Landscape(problem, top=2, noise=0.05)
    for _ in range(after):
        (request,) = engine.ask()
        engine.tell(request, landscape(request))
    engine.finish()
    rest = run(engine, landscape)
    assert {request.origin for request in rest} <= {"confirmation"}
    assert (engine.decision() is None) == (after == 0)
    if after > 1:
        assert engine.decision().num_seeds == 3


def test_a_result_that_arrives_after_the_finish_is_kept(problem):
    engine, landscape = make_engine(problem), Landscape(problem, top=2)
    for request in engine.ask(2):
        engine.tell(request, landscape(request))
    late = engine.ask(3)
    assert late
    engine.finish()
    confirmed = engine.ask(50)
    assert {request.origin for request in confirmed} == {"confirmation"}
    for request in [*confirmed, *late]:
        engine.tell(request, landscape(request))
    run(engine, landscape)
    assert engine.ledger.outcome(late[0].arm, late[0].level) == landscape(late[0])


def test_a_pool_is_all_that_is_asked_for(problem):
    rng = np.random.default_rng(0)
    pool = [c for c in dict.fromkeys(problem.space.sample(rng) for _ in range(400)) if problem.is_feasible(c)][:40]
    engine = SearchEngine(problem, plan_spending((0.1, 1.0), 20.0), pool=pool)
    asked = run(engine, Landscape(problem, top=1))
    assert {request.arm for request in asked} <= set(pool)
    assert len({(r.arm, r.level, r.seed) for r in asked}) == len(asked)


def test_exploring_ends_when_the_budget_does(problem):
    """No model is fitted for candidates that could not be evaluated."""
    engine = make_engine(problem)
    stage_asks = []
    make = engine._trust_region

    def recorded():
        stage = make()
        ask = stage.ask
        stage.ask = lambda num: stage_asks.append(num) or ask(num)
        return stage

    engine._phases[-2]._make_stage = recorded
    asked = run(engine, Landscape(problem, top=2))
    num = sum(request.origin == "trust_region" for request in asked)
    assert num <= len(stage_asks) <= num + 1  # one that finds nothing


def test_many_groups():
    problem = make_problem(224, seed=1)
    engine = make_engine(problem, costs=(0.01, 1.0), total=6.0, max_trials=10, num_seeds=1)
    asked = run(engine, Landscape(problem, top=1))
    assert {request.origin for request in asked} == {"baseline", "allocation", "evolution", "trust_region"}


def test_the_surrogate_is_judged_before_it_decides(problem):
    engine = make_engine(problem, total=60.0)
    run(engine, Landscape(problem, top=2))
    assert engine.surrogate_checks
    assert all(check.num_results >= 4 for check in engine.surrogate_checks)


def test_a_searched_plan_with_more_seeds_than_any_baseline_is_compared_all_the_same(problem):
    for total in (6.5, 7.0, 7.9):
        spending = plan_spending((1.0,), total, num_seeds=3)
        engine = SearchEngine(problem, spending)
        run(engine, Landscape(problem, top=0, noise=0.05))
        decision = engine.decision()
        seeds = {arm: engine.ledger.num_seeds(arm, 0) for arm in engine.ledger.arms(0)}
        assert decision.num_seeds <= max(seeds[arm] for arm in (engine.allocation, engine.uniform) if arm in seeds)
