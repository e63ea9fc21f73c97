"""Runs: cost, repeats, recommendations."""

from __future__ import annotations

import pytest

from benchmarks.search.environment import Evaluation
from benchmarks.search.landscapes import additive, multi_fidelity
from benchmarks.search.run import MAX_REPEATS, CostSpent, PoolEmpty, Run, until_spent


@pytest.fixture
def landscape():
    return multi_fidelity(0, num_layers=1)


def candidates(landscape):
    space = landscape.problem.space
    uniform = (space.uniform(bits, rank) for bits in space.bit_choices for rank in space.rank_choices)
    return [candidate for candidate in uniform if landscape.problem.is_feasible(candidate)]


def test_a_run_ends_before_it_exceeds_its_cost(landscape):
    run = Run(landscape, budget=1.3)
    first, second, *_ = candidates(landscape)
    run.evaluate(first, level=0)
    run.evaluate(first)
    assert run.cost == pytest.approx(1.05)
    run.evaluate(first, level=1)
    assert not run.can_afford(0)
    with pytest.raises(CostSpent):
        run.evaluate(second, level=0)
    assert [record.cost for record in run.records] == pytest.approx([0.05, 1.05, 1.3])


def test_repeats_are_free_until_nothing_else_is_proposed(landscape):
    run = Run(landscape, budget=2.0)
    candidate = candidates(landscape)[0]
    first = run.evaluate(candidate)
    assert [run.evaluate(candidate) for _ in range(MAX_REPEATS)] == [first] * MAX_REPEATS
    assert run.cost == 1.0
    with pytest.raises(CostSpent):
        run.evaluate(candidate)


def test_recommends_the_best_of_the_highest_level_that_was_used(landscape):
    first, second, *_ = sorted(candidates(landscape), key=lambda c: landscape.level_loss(c, 0))
    run = Run(landscape, budget=5.0)
    run.evaluate(second, level=0)
    run.evaluate(first, level=0)
    assert run.records[-1].recommendation == first
    run.evaluate(second)
    assert run.records[-1].recommendation == second
    run.recommend(first)
    assert [cost for cost, _ in run.regrets()] == pytest.approx([0.05, 0.1, 1.1])
    assert run.regrets()[-1][1] == pytest.approx(landscape.true_loss(first) - landscape.optimum_loss)


def test_seeds_of_one_candidate_are_averaged():
    class Recorded:
        """Two seeds of one candidate, one lucky."""

        problem, level_costs, pool, optimum_loss = additive(0, num_layers=1).problem, (1.0,), None, 0.0

        def resolve(self, candidate, taken):
            return candidate

        def evaluate(self, candidate, level, seed=0):
            loss = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 1.5}[candidate[0][1], seed]
            return Evaluation(loss, (loss,))

    run = Run(Recorded(), budget=3.0)
    lucky, steady = ((0, 0), (0, 0)), ((0, 1), (0, 0))
    for candidate, seed in ((lucky, 0), (steady, 0), (lucky, 1)):
        run.evaluate(candidate, seed=seed)
    assert [record.recommendation for record in run.records] == [lucky, lucky, steady]


def test_refuses_proposals_above_the_budget_of_bytes(landscape):
    with pytest.raises(ValueError, match="budget of bytes"):
        Run(landscape, budget=1.0).evaluate(landscape.problem.space.uniform(8, 32))


def test_an_empty_pool_ends_the_run(landscape):
    class Empty(type(landscape)):
        def resolve(self, candidate, taken):
            return None

    with pytest.raises(PoolEmpty):
        Run(Empty(**vars(landscape)), budget=1.0).evaluate(candidates(landscape)[0])


def test_a_method_may_end_before_its_cost(landscape):
    method = until_spent(lambda run, seed: run.evaluate(candidates(landscape)[seed]))
    run = method(landscape, 5.0, 1)
    assert [record.candidate for record in run.records] == [candidates(landscape)[1]]
