from dataclasses import replace

import numpy as np
import pytest

from peft_autoqra.importance.allocation import allocate
from peft_autoqra.importance.warm_starts import best_allocation, best_uniform, floored_allocations, smaller_allocations
from tests.search.synthetic import brute_force, make_problem

SMALL = {"bit_choices": (2, 4), "rank_choices": (0, 8, 16)}


def test_the_allocation_is_exact():
    problem = make_problem(4, seed=3, budget_fraction=0.6, **SMALL)
    assert problem.predicted_loss(best_allocation(problem)) == pytest.approx(
        brute_force(problem, problem.predicted_loss)[0]
    )


def test_an_allocation_without_adapters_gives_way_to_one_that_trains():
    problem = make_problem(4, seed=3, **SMALL)
    losses = problem.loss_table + np.array([0.0, 10.0, 20.0])  # ranks are worth less than nothing
    useless = replace(problem, loss_table=losses)
    assert not useless.is_trainable(allocate(useless))
    assert useless.is_trainable(best_allocation(useless))
    tight = replace(useless, budget_bytes=useless.smallest_trainable_bytes)
    assert best_allocation(tight) == tight.smallest_trainable_candidate()


def test_floors_are_kept_and_the_rest_is_exact():
    problem = make_problem(4, seed=3, budget_fraction=0.9, **SMALL)
    found = list(floored_allocations(problem))
    assert len(found) == 2
    for floor, candidate in enumerate(found, 1):
        assert all(rank >= floor for _, rank in candidate)
        assert problem.is_feasible(candidate)

        def loss(candidate, floor=floor):
            return problem.predicted_loss(candidate) + 1e9 * any(rank < floor for _, rank in candidate)

        assert problem.predicted_loss(candidate) == pytest.approx(brute_force(problem, loss)[0])


def test_floors_out_of_reach_are_left_out():
    problem = make_problem(4, seed=3, **SMALL)
    tight = replace(problem, budget_bytes=problem.total_bytes(problem.space.uniform(2, 8)))
    assert list(floored_allocations(tight)) == [problem.space.uniform(2, 8)]
    assert list(floored_allocations(replace(problem, budget_bytes=problem.smallest_bytes))) == []


def test_groups_with_smaller_weights_have_lower_floors():
    problem = make_problem(3, seed=3, max_rank=8, budget_fraction=0.9, **SMALL)
    assert all(rank == 1 for candidate in floored_allocations(problem) for _, rank in candidate)


def test_best_uniform_by_enumeration():
    problem = make_problem(6, seed=1, budget_fraction=0.4)
    space = problem.space
    found = best_uniform(problem)
    largest = {}
    for bits in space.bit_choices:
        for rank in space.rank_choices:
            if problem.is_feasible(space.uniform(bits, rank)):
                largest[bits] = space.uniform(bits, rank)
    trainable = [candidate for candidate in largest.values() if problem.is_trainable(candidate)]
    assert found in trainable
    assert problem.predicted_loss(found) == min(map(problem.predicted_loss, trainable))


def test_no_uniform_candidate_within_the_budget():
    problem = make_problem(6, seed=1, **SMALL)
    assert best_uniform(replace(problem, budget_bytes=problem.smallest_trainable_bytes)) is None


def test_smaller_allocations_lie_below_the_budget_largest_first():
    problem = make_problem(6, seed=1, budget_fraction=0.6)
    sizes = [problem.total_bytes(candidate) for candidate in smaller_allocations(problem)]
    assert len(sizes) == 4
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= problem.budget_bytes
    at_the_floor = replace(problem, budget_bytes=problem.smallest_bytes)
    assert smaller_allocations(at_the_floor) == [problem.smallest_candidate()]
