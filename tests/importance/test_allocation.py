from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_autoqra.errors import MemoryBudgetError
from peft_autoqra.importance import allocation
from peft_autoqra.importance.allocation import AllocationError, allocate, pareto_allocations
from peft_autoqra.search_problem import SearchProblem
from tests.search.synthetic import brute_force, make_problem, make_space


@st.composite
def random_problems(draw):
    """Tables without any order along the ladders, sizes from bytes to gigabytes, budgets anywhere."""
    num_groups = draw(st.integers(1, 4))
    space = make_space(
        num_groups, bit_choices=(2, 4), rank_choices=(0, 8, 16), max_rank=draw(st.sampled_from([8, 16]))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.integers(0, draw(st.sampled_from([4, 1000, 10**9])) + 1, size=(num_groups, 2, 3))
    losses = rng.normal(size=(num_groups, 2, 3)) * draw(st.sampled_from([1e-6, 1.0, 1e6]))
    if draw(st.booleans()):
        losses = np.round(losses)  # ties, and groups that do not care
    slack = draw(st.floats(0, 1))
    smallest = SearchProblem(space, sizes, losses, fixed_bytes=7, budget_bytes=10**12).smallest_bytes
    return SearchProblem(space, sizes, losses, fixed_bytes=7, budget_bytes=smallest + int(slack * sizes.sum()))


@settings(max_examples=150, deadline=None)
@given(problem=random_problems())
def test_equals_brute_force_on_random_tables(problem):
    found = allocate(problem)
    best_loss, _ = brute_force(problem, problem.predicted_loss)
    assert problem.is_feasible(found)
    spread = np.ptp(problem.loss_table) * problem.space.num_groups
    assert problem.predicted_loss(found) == pytest.approx(best_loss, abs=2e-6 * spread + 1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 2.0])
def test_equals_brute_force_on_model_like_tables(seed, fraction):
    problem = make_problem(4, seed, fraction, bit_choices=(2, 3, 4), rank_choices=(0, 8, 16))
    assert problem.predicted_loss(allocate(problem)) == pytest.approx(brute_force(problem, problem.predicted_loss)[0])


@pytest.mark.timeout(60)
def test_solves_210_groups_exactly_within_the_budget():
    problem = make_problem(210, seed=3, budget_fraction=0.6)
    odd = replace(problem, bytes_table=problem.bytes_table * 1001 + 1, budget_bytes=problem.budget_bytes * 1001)
    for instance in (problem, odd):
        found = allocate(instance)
        assert instance.is_feasible(found)
        assert instance.predicted_loss(found) <= instance.predicted_loss(allocate(instance, instance.budget_bytes - 1))


def test_is_deterministic_and_prefers_low_rungs_in_ties():
    space = make_space(3, bit_choices=(2, 4), rank_choices=(0, 8))
    sizes, losses = np.ones((3, 2, 2), dtype=np.int64), np.zeros((3, 2, 2))
    problem = SearchProblem(space, sizes, losses, fixed_bytes=0, budget_bytes=3)
    assert allocate(problem) == ((0, 0),) * 3
    large = make_problem(64, seed=1)
    assert allocate(large) == allocate(large)


def test_respects_ranks_that_a_group_does_not_allow():
    problem = make_problem(3, budget_fraction=5.0, bit_choices=(2, 4), rank_choices=(0, 8, 16), max_rank=8)
    assert all(rank <= 1 for _, rank in allocate(problem))


def test_whole_front_has_falling_losses_within_each_budget():
    problem = make_problem(12)
    budgets = np.linspace(problem.smallest_bytes, problem.budget_bytes, 6).astype(int).tolist()
    front = pareto_allocations(problem, budgets)
    assert all(problem.total_bytes(c) <= budget for c, budget in zip(front, budgets, strict=True))
    losses = [problem.predicted_loss(c) for c in front]
    assert losses == sorted(losses, reverse=True)


def test_budget_below_the_smallest_candidate_names_what_is_reachable():
    problem = make_problem(4)
    with pytest.raises(MemoryBudgetError, match=f"{problem.smallest_bytes:,}"):
        allocate(problem, problem.smallest_bytes - 1)


def test_unsolved_knapsack_says_so(monkeypatch):
    monkeypatch.setattr(allocation, "TIME_LIMIT_SECONDS", 0.0)
    with pytest.raises(AllocationError, match="coarser granularity"):
        allocate(make_problem(64, seed=1, budget_fraction=0.6))


def test_solution_above_the_budget_by_tolerance_is_solved_again(monkeypatch):
    problem = make_problem(6, seed=2)
    solve, calls = allocation._solve_relaxed_row, []

    def sloppy(options, limit):
        calls.append(limit)
        return solve(options, limit + (3 if len(calls) == 1 else 0))

    monkeypatch.setattr(allocation, "_solve_relaxed_row", sloppy)
    assert problem.is_feasible(allocate(problem))
