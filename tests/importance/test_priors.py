import numpy as np
import pytest

from peft_autoqra.importance.priors import ImportancePriors, round_priors
from peft_autoqra.search_problem import SearchProblem
from tests.search.synthetic import make_problem, make_space


def problem_with_losses(losses):
    space = make_space(len(losses), bit_choices=(2, 4), rank_choices=(0, 8, 16))
    return SearchProblem(space, np.ones_like(losses, dtype=np.int64), losses, fixed_bytes=0, budget_bytes=100)


def test_priors_are_the_scaled_bit_rise_and_rank_gain():
    losses = np.zeros((3, 2, 3))
    losses[:, 0, :] = [[4, 4, 4], [2, 1, 0], [1, 1, 1]]
    importance = ImportancePriors.from_problem(problem_with_losses(losses))
    np.testing.assert_allclose(importance.bits, [1, 1 / 3, 0])
    np.testing.assert_allclose(importance.rank, [0, 1, 0])


def test_equal_groups_get_one_half():
    importance = ImportancePriors.from_problem(problem_with_losses(np.zeros((2, 2, 3))))
    np.testing.assert_allclose(importance.bits, 0.5)


def test_marginal_steps_are_the_rises_that_the_table_says():
    problem = make_problem(5)
    steps = ImportancePriors.from_marginal_losses(problem).steps
    rise = problem.loss_table[3, 1, 2] - problem.loss_table[3, 2, 2]
    other = problem.loss_table[1, 0, 4] - problem.loss_table[1, 0, 5]
    assert steps[3, 2, 2, 0] / steps[1, 0, 5, 1] == pytest.approx(rise / other)


@pytest.mark.parametrize("make", [ImportancePriors.from_problem, ImportancePriors.from_marginal_losses])
def test_there_is_no_step_below_the_lowest_rung(make):
    steps = make(make_problem(5)).steps
    assert np.isinf(steps[:, 0, :, 0]).all()
    assert np.isinf(steps[:, :, 0, 1]).all()


def test_rounding_takes_the_ends_of_the_ladders():
    problem = make_problem(20, max_rank=8)
    importance = ImportancePriors.from_problem(problem)
    rounded = round_priors(problem.space, importance)
    assert problem.space.contains(rounded)
    assert rounded[int(importance.bits.argmax())][0] == len(problem.space.bit_choices) - 1
    assert rounded[int(importance.rank.argmin())][1] == 0
