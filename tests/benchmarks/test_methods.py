"""Every method on small problems: keeps its cost, follows its seed, improves."""

from __future__ import annotations

import random
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks.search.landscapes import interactions, multi_fidelity
from benchmarks.search.methods.nsga2 import seeded_random
from benchmarks.search.methods.paper_evolution import PaperEvolution
from benchmarks.search.methods.paper_surrogate import PaperSurrogate
from benchmarks.search.methods.registry import METHODS
from benchmarks.search.methods.turbo import NUM_INITIAL, cube_points, rounded
from benchmarks.search.replay import load_replays
from benchmarks.search.run import Run
from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.importance.priors import ImportancePriors
from tests.benchmarks.recorded_table import write_table

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="the extra benchmark is not installed")
EVERY_METHOD = [pytest.param(name, marks=[needs_optuna] * name.startswith("optuna")) for name in METHODS]
SEARCHES = [parameter for parameter in EVERY_METHOD if parameter.values[0] != "allocation"]


@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.parametrize("landscape", [interactions, multi_fidelity])
def test_keeps_its_cost_and_follows_its_seed(name, landscape):
    environment = landscape(0, num_layers=2)
    first, same = (METHODS[name](environment, 5.0, 0) for _ in range(2))
    assert first.records == same.records
    assert first.records[-1].cost <= 5.0 + 1e-9
    assert len({(r.candidate, r.level, r.seed) for r in first.records}) == len(first.records)
    assert all(environment.problem.is_feasible(record.candidate) for record in first.records)


@pytest.mark.parametrize("name", SEARCHES)
def test_spends_its_cost_and_draws_by_its_seed(name):
    environment = interactions(0, num_layers=2)
    first, other = (METHODS[name](environment, 6.0, seed) for seed in (0, 1))
    assert len(first.records) == 6
    assert first.records != other.records


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_replays_a_pool(name, tmp_path):
    _, candidates = write_table(tmp_path)
    run = METHODS[name](load_replays(tmp_path)["real-3bit"], 12.0, 0)
    assert {record.candidate for record in run.records} <= set(candidates)
    assert run.cost <= 12.0 + 1e-9


@pytest.mark.skipif(find_spec("optuna") is not None, reason="the extra benchmark is installed")
def test_names_the_extra_that_optuna_comes_with():
    with pytest.raises(MissingDependencyError, match="benchmark"):
        METHODS["optuna-tpe"](interactions(0, num_layers=1), 2.0, 0)


def test_turbo_proposes_better_than_its_initial_points():
    records = METHODS["turbo"](interactions(0, num_layers=3), NUM_INITIAL + 5.0, 0).records
    losses = [record.loss for record in records]
    assert np.mean(losses[NUM_INITIAL:]) < np.median(losses[:NUM_INITIAL])


def test_turbo_rounds_the_cube_to_the_ladders():
    space = interactions(0, num_layers=1).problem.space
    candidate = ((0, 4), (3, 2))
    point = cube_points(space, [candidate])[0]
    assert point.tolist() == pytest.approx([0.125, 0.9, 0.875, 0.5])
    assert rounded(space, point) == candidate
    assert rounded(space, point * 0 + 1) == ((3, 4), (3, 4))


def test_the_paper_climbs_from_low_to_high_fidelity():
    environment = multi_fidelity(0, num_layers=2)
    records = METHODS["paper"](environment, 7.0, 0).records
    levels = [record.level for record in records]
    assert set(levels) == {0, 2}
    assert levels[0] == 0
    assert levels.count(0) > levels.count(2)


def test_the_paper_scales_its_population_and_promotions_to_the_cost():
    run = Run(multi_fidelity(0, num_layers=1), 1000.0)
    published = PaperEvolution(run, 12 * (40 * 0.05 + 6), 0)
    assert (published.population_size, published.num_promoted) == (40, 6)
    half = PaperEvolution(run, 6 * (40 * 0.05 + 6), 0)
    assert (half.population_size, half.num_promoted) == (20, 3)


def test_the_papers_surrogate_learns_the_expensive_losses():
    landscape = multi_fidelity(0, num_layers=4)
    problem, rng = landscape.problem, np.random.default_rng(0)
    surrogate = PaperSurrogate(problem, ImportancePriors.from_problem(problem), seed=0)
    cheap = [(c, landscape.level_loss(c, 0)) for c in (problem.space.sample(rng) for _ in range(40))]
    assert surrogate.predict(cheap) == [loss for _, loss in cheap]
    expensive = [landscape.true_loss(candidate) for candidate, _ in cheap]
    surrogate.fit(cheap, expensive)
    errors = np.subtract(surrogate.predict(cheap), expensive)
    assert errors.std() < 0.3 * np.std(expensive)


def test_deap_leaves_pythons_generator_as_it_was():
    state = random.getstate()
    with seeded_random(5):
        first = random.random()
    assert random.getstate() == state
    with seeded_random(5):
        assert random.random() == first
