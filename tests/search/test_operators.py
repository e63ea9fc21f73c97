import itertools
from collections import Counter

import numpy as np
import pytest

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import repair
from peft_autoqra.search.operators import block_crossover, coupled_mutation, guided_mutation, swap_mutation
from tests.search.synthetic import make_problem


@pytest.fixture
def problem():
    return make_problem(12, seed=4, budget_fraction=0.3)


@pytest.fixture
def importance(problem):
    return ImportancePriors.from_marginal_losses(problem)


@pytest.mark.parametrize("mutation", [guided_mutation, coupled_mutation, swap_mutation])
def test_mutants_are_feasible_and_repeatable(problem, importance, mutation):
    start = repair(problem, problem.space.uniform(16, 64), importance)
    mutants = [mutation(problem, importance, start, np.random.default_rng(seed)) for seed in range(50)]
    assert all(problem.is_feasible(mutant) for mutant in mutants)
    assert mutants == [mutation(problem, importance, start, np.random.default_rng(seed)) for seed in range(50)]
    assert len(set(mutants)) > 10


def test_important_groups_are_mutated_more_often(importance):
    roomy = make_problem(12, seed=4, budget_fraction=50.0)
    rng, start = np.random.default_rng(0), roomy.space.uniform(4, 16)
    changed = Counter()
    for _ in range(400):
        mutant = guided_mutation(roomy, importance, start, rng)
        changed.update(group for group in range(12) if mutant[group][0] != start[group][0])
    assert changed[int(importance.bits.argmax())] > 5 * changed[int(importance.bits.argmin())]


def test_coupled_mutation_raises_one_variable_and_others_pay(problem, importance):
    start = repair(problem, problem.space.uniform(16, 64), importance)
    change = problem.space.as_array(coupled_mutation(problem, importance, start, np.random.default_rng(3)))
    change = change - problem.space.as_array(start)
    assert change.max() == 1
    assert (change > 0).sum() == 1
    assert (change < 0).any()


def test_swap_exchanges_two_choices(problem, importance):
    roomy = make_problem(12, seed=4, budget_fraction=50.0)
    start = tuple((group % 3, group % 4) for group in range(12))
    mutant = swap_mutation(roomy, importance, start, np.random.default_rng(0))
    assert sorted(mutant) == sorted(start)
    assert sum(new != old for new, old in zip(mutant, start, strict=True)) == 2


def test_swap_cuts_ranks_to_what_the_group_allows():
    problem = make_problem(2, budget_fraction=50.0, max_rank=8)
    importance = ImportancePriors.from_problem(problem)
    assert problem.is_feasible(swap_mutation(problem, importance, ((0, 2), (1, 1)), np.random.default_rng(0)))


def test_crossover_takes_one_contiguous_block(problem, importance):
    roomy = make_problem(12, seed=4, budget_fraction=50.0)
    first, second = roomy.space.uniform(2, 0), roomy.space.uniform(4, 8)
    for seed in range(20):
        child = block_crossover(roomy, importance, (first, second), np.random.default_rng(seed))
        origins = [choice == second[0] for choice in child]
        assert sum(a != b for a, b in itertools.pairwise(origins)) <= 2


@pytest.mark.parametrize("mutation", [guided_mutation, coupled_mutation, swap_mutation])
def test_a_space_without_choices_gives_the_candidate_back(mutation):
    problem = make_problem(1, bit_choices=(4,), rank_choices=(8,))
    importance = ImportancePriors.from_problem(problem)
    assert mutation(problem, importance, ((0, 0),), np.random.default_rng(0)) == ((0, 0),)
