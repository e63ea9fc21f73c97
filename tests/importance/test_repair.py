import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_autoqra.importance.allocation import allocate
from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import EPSILON, fill, repair
from peft_autoqra.search_problem import SearchProblem
from tests.search.synthetic import make_problem, make_space


def reference_repair(problem, candidate, importance):
    """Eq. 4-5 word for word, trying every step every time."""
    while problem.total_bytes(candidate) > problem.budget_bytes:
        options = []
        for group, choice in enumerate(candidate):
            for axis in (0, 1):
                if choice[axis] == 0:
                    continue
                lower = (choice[0] - (axis == 0), choice[1] - (axis == 1))
                changed = (*candidate[:group], lower, *candidate[group + 1 :])
                saved = problem.total_bytes(candidate) - problem.total_bytes(changed)
                prior = (importance.bits, importance.rank)[axis][group]
                options.append(((prior + EPSILON) / saved, group, axis, changed))
        candidate = min(options)[3]
    return candidate


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_papers_rule(seed):
    problem = make_problem(8, seed, 0.2)
    importance = ImportancePriors.from_problem(problem)
    start = problem.space.uniform(16, 64)
    assert repair(problem, start, importance) == reference_repair(problem, start, importance)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), fraction=st.floats(0, 1.5))
def test_repair_keeps_the_budget_and_fill_uses_it(seed, fraction):
    rng = np.random.default_rng(seed)
    problem = make_problem(6, seed, fraction)
    importance = ImportancePriors.from_marginal_losses(problem)
    repaired = repair(problem, problem.space.sample(rng), importance, rng)
    filled = fill(problem, repaired, importance, rng)
    assert problem.is_feasible(repaired)
    assert problem.is_feasible(filled)
    assert problem.predicted_loss(filled) <= problem.predicted_loss(repaired)
    assert all(new >= old for new, old in zip(np.ravel(filled), np.ravel(repaired), strict=True))


def test_what_fits_comes_back_as_it_is():
    problem = make_problem(6)
    smallest = problem.smallest_candidate()
    assert repair(problem, smallest, ImportancePriors.from_problem(problem), np.random.default_rng(0)) == smallest


def test_tables_that_do_not_grow_along_the_ladders_end_at_the_smallest_candidate():
    space = make_space(1, bit_choices=(2, 3, 4), rank_choices=(0,))
    sizes = np.array([[[5], [9], [1]]])
    problem = SearchProblem(space, sizes, np.zeros((1, 3, 1)), fixed_bytes=0, budget_bytes=2)
    assert repair(problem, ((1, 0),), ImportancePriors.from_problem(problem)) == ((2, 0),)


def test_marginal_prices_come_near_the_exact_allocation():
    problem = make_problem(64, seed=5, budget_fraction=0.3)
    top = problem.space.uniform(16, 64)
    repaired = repair(problem, top, ImportancePriors.from_marginal_losses(problem))
    assert problem.predicted_loss(repaired) <= 1.1 * problem.predicted_loss(allocate(problem))
