"""Synthetic landscapes: known optimum, paired noise, levels, traps."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from benchmarks.search.landscapes import (
    LANDSCAPES,
    additive,
    deceptive,
    exact_proxy,
    interactions,
    multi_fidelity,
    noisy,
)
from benchmarks.search.methods.random_search import random_candidate
from peft_autoqra.importance.allocation import allocate
from peft_autoqra.importance.priors import ImportancePriors

KINDS = [additive, interactions, deceptive, noisy, multi_fidelity]


def feasible_candidates(landscape, num, seed=0):
    rng, problem = np.random.default_rng(seed), landscape.problem
    priors = ImportancePriors.from_marginal_losses(problem)
    return [random_candidate(problem, priors, rng) for _ in range(num)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_optimum_equals_enumeration(kind, seed):
    landscape = kind(seed, num_layers=1)
    choices = list(itertools.product(range(4), range(5)))
    candidates = filter(landscape.problem.is_feasible, itertools.product(choices, repeat=2))
    best = min(candidates, key=landscape.true_loss)
    assert landscape.optimum[0] == best
    assert landscape.optimum_loss == pytest.approx(landscape.true_loss(best), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_optimum_of_a_whole_landscape(kind):
    landscape = kind(0)
    candidate, loss = landscape.optimum
    assert landscape.problem.space.num_groups == 32
    assert landscape.problem.is_feasible(candidate)
    assert landscape.true_loss(candidate) == pytest.approx(loss, abs=1e-9)
    others = feasible_candidates(landscape, 20) + list(landscape.problem.space.neighbors(candidate))
    assert all(landscape.true_loss(other) >= loss for other in others if landscape.problem.is_feasible(other))


def test_optimum_of_an_exact_proxy_is_the_allocation():
    landscape = exact_proxy(0)
    assert landscape.true_loss(allocate(landscape.problem)) == pytest.approx(landscape.optimum_loss, abs=1e-6)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_the_seed_draws_everything(name):
    first, same, other = LANDSCAPES[name](1), LANDSCAPES[name](1), LANDSCAPES[name](2)
    candidate = first.optimum[0]
    assert first.evaluate(candidate, 0, seed=3) == same.evaluate(candidate, 0, seed=3)
    assert first.evaluate(candidate, 0, seed=3) != first.evaluate(candidate, 0, seed=4)
    assert not np.array_equal(first.problem.loss_table, other.problem.loss_table)


@pytest.mark.parametrize("kind", [interactions, noisy])
def test_paired_differences_are_less_noisy_than_losses(kind):
    landscape = kind(0)
    first, second = feasible_candidates(landscape, 2)
    one, two = (landscape.evaluate(candidate, 0) for candidate in (first, second))
    assert one.loss == pytest.approx(np.mean(one.sequence_losses))
    differences = np.subtract(one.sequence_losses, two.sequence_losses)
    assert differences.std() < 0.5 * np.std(one.sequence_losses)
    true_difference = landscape.true_loss(first) - landscape.true_loss(second)
    tolerance = 4 * np.hypot(landscape.noise.sequence / np.sqrt(len(differences)), landscape.noise.seed) * np.sqrt(2)
    assert differences.mean() == pytest.approx(true_difference, abs=tolerance)


def test_seeds_shift_all_candidates_alike():
    landscape = interactions(0)
    shifts = [
        landscape.evaluate(candidate, 0, seed=1).loss - landscape.evaluate(candidate, 0, seed=0).loss
        for candidate in feasible_candidates(landscape, 5)
    ]
    assert np.std(shifts) < 0.3 * abs(np.mean(shifts))


def test_noise_averages_out_over_seeds():
    landscape = noisy(0)
    candidate = landscape.optimum[0]
    losses = [landscape.evaluate(candidate, 0, seed).loss for seed in range(400)]
    assert np.std(losses) > 0.02
    assert np.mean(losses) == pytest.approx(landscape.optimum_loss, abs=4 * np.std(losses) / 20)


def test_higher_levels_correlate_better():
    landscape = multi_fidelity(0)
    assert landscape.level_costs == tuple(sorted(landscape.level_costs))
    candidates = feasible_candidates(landscape, 60)
    losses = [[landscape.level_loss(candidate, level) for candidate in candidates] for level in range(3)]
    correlations = np.corrcoef(losses)[-1]
    assert 0.2 < correlations[0] < correlations[1] < 0.9999
    assert np.mean(losses[0]) > np.mean(losses[1]) > np.mean(losses[2])


def test_descent_from_the_allocation_is_trapped():
    landscape = deceptive(0)
    problem = landscape.problem
    candidate = allocate(problem)
    improved = True
    while improved:
        better = min(filter(problem.is_feasible, problem.space.neighbors(candidate)), key=landscape.true_loss)
        improved = landscape.true_loss(better) < landscape.true_loss(candidate)
        candidate = better if improved else candidate
    assert landscape.true_loss(candidate) > landscape.optimum_loss + 0.05


def test_couplings_never_lower_the_loss_below_the_base():
    landscape = partial(interactions, num_layers=4)(0)
    assert min(map(landscape.true_loss, feasible_candidates(landscape, 100))) > 3.0
