import random

import pytest

from peft_autoqra.importance.allocation import allocate
from peft_autoqra.search.evolution import EvolutionSettings, EvolutionStage
from peft_autoqra.search.pareto import nondominated
from tests.search.synthetic import InteractingTruth, make_problem


def run(stage, truth):
    while not stage.is_done:
        stage.tell([(candidate, truth(candidate)) for candidate in stage.ask()])
    return stage


def test_initial_candidates_come_first_repaired_and_once():
    problem = make_problem(8)
    best, top = allocate(problem), problem.space.uniform(16, 64)
    batch = EvolutionStage(problem, EvolutionSettings(population_size=10), [best, best, top]).ask()
    assert batch[0] == best
    assert len(set(batch)) == len(batch) == 10
    assert all(problem.is_feasible(candidate) for candidate in batch)


def test_improves_on_the_exact_allocation_where_the_proxy_is_wrong():
    gains = []
    for seed in range(4):
        problem = make_problem(16, seed, budget_fraction=0.6)
        truth = InteractingTruth(problem, seed)
        best = allocate(problem)
        stage = run(EvolutionStage(problem, EvolutionSettings(num_generations=6, seed=seed), [best]), truth)
        gains.append(truth(best) - stage.pareto_front()[-1].loss)
    assert min(gains) >= 0
    assert sum(gain > 1e-3 for gain in gains) >= 3


def test_front_is_nondominated_and_within_the_budget():
    problem = make_problem(10)
    stage = run(EvolutionStage(problem, EvolutionSettings(population_size=20)), InteractingTruth(problem))
    front = stage.pareto_front()
    assert front == nondominated(front)
    assert len(front) > 3
    assert all(point.total_bytes <= problem.budget_bytes for point in front)


def test_stops_when_the_hypervolume_stalls():
    problem = make_problem(16)
    stage = run(EvolutionStage(problem, EvolutionSettings(population_size=6, num_generations=50)), lambda _: 3.0)
    assert stage.generation == 4  # the first, and three without growth
    eager = EvolutionStage(problem, EvolutionSettings(population_size=6, num_generations=5, hypervolume_tolerance=0))
    assert run(eager, InteractingTruth(problem)).generation == 5


def test_untold_candidates_are_given_again_and_the_generation_waits():
    problem = make_problem(8)
    stage = EvolutionStage(problem, EvolutionSettings(population_size=5))
    batch = stage.ask()
    stage.tell([(batch[0], 1.0)])
    assert stage.ask() == batch[1:]
    assert stage.generation == 0
    stage.tell([(candidate, 2.0) for candidate in batch[1:]])
    assert stage.generation == 1


def test_global_random_state_is_left_alone():
    problem, state = make_problem(8), random.getstate()
    run(EvolutionStage(problem, EvolutionSettings(population_size=8, num_generations=3)), InteractingTruth(problem))
    assert random.getstate() == state


def test_infeasible_results_are_refused():
    problem = make_problem(8)
    with pytest.raises(ValueError, match="above the budget"):
        EvolutionStage(problem, EvolutionSettings()).tell([(problem.space.uniform(16, 64), 1.0)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"population_size": 0},
        {"num_generations": 0},
        {"fill_probability": 1.5},
        {"coupled_probability": 0.7, "swap_probability": 0.7},
        {"gamma": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        EvolutionSettings(**wrong)
