"""Simulated searches beside what a reader can work out by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.scale.cases import COMPARED_WORKERS, Case, World
from benchmarks.scale.machines import Gpu, Recipe, worker_memory
from benchmarks.scale.models import model_size
from benchmarks.scale.picture import plot
from benchmarks.scale.searches import recorded_ratios, simulate_search, stage_times
from benchmarks.scale.simulation import SimulatedTrial, simulate
from benchmarks.scale.tables import memory_row, size_row, stage_rows, table, workers_row
from benchmarks.search.overhead import Overhead
from peft_autoqra.search.ledger import Outcome, Request
from peft_autoqra.search_config import SearchArguments
from peft_autoqra.search_costs import SearchCosts

DONE = Outcome(1.0)
COSTS = SearchCosts(full_steps=200, step_tokens=64.0, eval_tokens=16.0, calibration_tokens=64.0, fit_tokens=20.0)
SEARCH = SearchArguments(num_eval_sequences=4, num_seeds=2, max_trials=9)


class Batches:
    """Asks for one batch after the other, each when all of the one before it was told."""

    def __init__(self, batches: list[list[float]]) -> None:
        self.seconds = {
            Request(f"{batch}-{index}", 0, "evolution"): seconds
            for batch, durations in enumerate(batches)
            for index, seconds in enumerate(durations)
        }
        requests = iter(self.seconds)
        self._batches = [[next(requests) for _ in durations] for durations in batches]
        self._pending: set[Request] = set()

    def ask(self, num):
        while self._batches and not self._batches[0] and not self._pending:
            self._batches.pop(0)
        if not self._batches:
            return []
        taken, self._batches[0] = self._batches[0][:num], self._batches[0][num:]
        self._pending |= set(taken)
        return taken

    def tell(self, request, _):
        self._pending.remove(request)


def _run(engine: Batches, num_workers: int, **settings) -> list[SimulatedTrial]:
    return simulate(engine, num_workers, engine.seconds.__getitem__, lambda _: DONE, **settings)


def _random_batches(seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 20, size=rng.integers(1, 9)).astype(float).tolist() for _ in range(5)]


def _list_scheduled(batches: list[list[float]], num_workers: int) -> float:
    """Batch by batch, each duration to the worker that is free first."""
    now = 0.0
    for durations in batches:
        free = [now] * num_workers
        for seconds in durations:
            free[free.index(min(free))] += seconds
        now = max(free)
    return now


@pytest.mark.parametrize("seed", range(5))
def test_one_worker_takes_the_sum(seed):
    batches = _random_batches(seed)
    trials = _run(Batches(batches), 1, begin_seconds=10.0, asking_seconds=0.5)
    total, num = sum(map(sum, batches)), sum(map(len, batches))
    assert trials[-1].end_seconds == pytest.approx(10.0 + total + 0.5 * num)
    assert sum(trial.seconds for trial in trials) == pytest.approx(total)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_workers", [2, 3, 7, 64])
def test_many_workers_take_what_list_scheduling_takes(seed, num_workers):
    batches = _random_batches(seed)
    trials = _run(Batches(batches), num_workers)
    taken = trials[-1].end_seconds
    assert taken == _list_scheduled(batches, num_workers)
    assert taken >= max(sum(map(sum, batches)) / num_workers, sum(map(max, batches)))
    assert len(trials) == sum(map(len, batches))
    for worker in range(num_workers):
        own = sorted((t.start_seconds, t.end_seconds) for t in trials if t.worker == worker)
        assert all(first[1] <= second[0] for first, second in pairwise(own))


def test_asking_delays_whoever_waits_for_it():
    trials = _run(Batches([[4.0, 4.0, 4.0], [1.0]]), 2, asking_seconds=1.0)
    # asked until 1 and until 2; the third when the first has ended at 5, the last when that has ended at 10
    assert [(t.start_seconds, t.end_seconds) for t in trials] == [(1.0, 5.0), (2.0, 6.0), (6.0, 10.0), (11.0, 12.0)]


def _simulated(num_workers: int, seed: int = 0, ratios=(1.0,), asking_seconds: float = 0.0):
    return simulate_search(
        COSTS,
        SEARCH,
        num_workers,
        full_seconds=1000.0,
        asking_seconds=asking_seconds,
        ratios=ratios,
        seed=seed,
        num_layers=2,
    )


@pytest.fixture(scope="module")
def alone():
    return _simulated(1)


def test_a_search_on_one_worker_takes_its_cost(alone):
    assert alone.seconds == pytest.approx(1000.0 * alone.cost)
    assert alone.calibration_seconds == pytest.approx(1000.0 * COSTS.calibration)
    assert alone.idle_share == pytest.approx(0.0, abs=1e-12)
    assert alone.num_trials == SEARCH.max_trials
    assert alone.cost <= SEARCH.max_cost
    assert alone.regret >= 0.0


def test_a_search_on_many_workers_is_bounded_by_work_and_waits_for_calibration(alone):
    many = _simulated(4)
    assert many.calibration_seconds == alone.calibration_seconds
    assert many.seconds < alone.seconds
    assert many.seconds - many.calibration_seconds >= (many.busy_seconds - many.calibration_seconds) / 4
    assert many.idle_share == pytest.approx(1 - many.busy_seconds / (4 * many.seconds))
    assert max(stage.most_running for stage in many.stages) <= 4


def test_the_same_seed_gives_the_same_search():
    ratios = (0.5, 1.0, 1.5)
    assert _simulated(3, ratios=ratios) == _simulated(3, ratios=ratios)
    assert _simulated(3, ratios=ratios) != _simulated(3, seed=1, ratios=ratios)


def test_stages_tell_how_many_trials_run_at_a_time():
    trials = [
        SimulatedTrial(Request("a", 2, "baseline"), 0, 0.0, 4.0),
        SimulatedTrial(Request("b", 2, "baseline"), 1, 1.0, 3.0),
        SimulatedTrial(Request("c", 0, "evolution"), 0, 4.0, 5.0),
        SimulatedTrial(Request("d", 1, "evolution"), 0, 5.0, 7.0),
    ]
    baselines, evolution, promotion = stage_times(trials)
    assert (baselines.seconds, baselines.mean_running, baselines.most_running) == (4.0, 1.5, 2)
    assert (evolution.stage, promotion.stage, promotion.seconds) == ("evolution", "promotion", 2.0)


def test_recorded_durations_are_relative_to_their_budget(tmp_path):
    rows = [("a", 10.0), ("a", 30.0), ("b", 5.0)]
    lines = [json.dumps({"budget": budget, "seconds": seconds}) for budget, seconds in rows]
    (tmp_path / "trials-0-of-1.jsonl").write_text("\n".join(lines))
    assert recorded_ratios(tmp_path) == (0.5, 1.5, 1.0)


@pytest.mark.parametrize(
    ("name", "published"),  # safetensors headers of the models' repositories
    [("1B", 1_235_814_400), ("3B", 3_212_749_824), ("8B", 8_030_261_248), ("70B", 70_553_706_496)],
)
def test_shapes_are_those_of_the_published_models(name, published):
    size = model_size(name)
    assert size.num_parameters == published
    assert size.model_bytes == pytest.approx(2 * published, rel=1e-6)  # and a buffer of rotary frequencies


def test_memory_of_a_worker():
    size, recipe, search = model_size("8B"), Recipe(), SearchArguments()
    memory = worker_memory(size, recipe, search)
    assert memory.copy_bytes == 2 * size.memory.num_weights
    assert memory.materialized_bytes == 4 * memory.copy_bytes  # 2, 3, 4 and 8 bits
    assert memory.num_gpus(Gpu()) == 1
    assert not memory.materializes(Gpu())
    assert memory.materializes(Gpu(memory_bytes=141e9))
    assert worker_memory(model_size("32B"), recipe, search).num_gpus(Gpu()) == 2
    adapters = 16 * sum(s.out_features + s.in_features for s in size.memory.modules.values())
    assert memory.training_bytes > 16 * adapters  # float32: weight, gradient and two states of Adam


def test_time_of_the_full_fine_tune():
    size = model_size("8B")
    operations = 4 * (size.num_parameters - 128_256 * 4096) * 1e6  # all but the embeddings; norms are nothing
    seconds = Recipe(num_tokens=1e6).full_seconds(size, Gpu(utilisation=0.5, peak_flops=1e15))
    assert seconds == pytest.approx(operations / 5e14, rel=1e-3)


def test_tables_and_picture(tmp_path):
    overheads = tuple(Overhead(groups, 10, seconds, 0.0, 0.0, 0.0) for groups, seconds in ((100, 1.0), (300, 5.0)))
    world = World(Gpu(), Recipe(), SEARCH, overheads, (1.0,))
    assert world.asking_seconds(200) == pytest.approx(0.3)
    searches = {num: _simulated(num) for num in (1, 2)}
    found = {
        Case("8B", num, seed, scatters): searches[num]
        for num in (1, 2)
        for seed in (0, 1)
        for scatters in (True, False)
    }
    sizes = [
        size_row(world, Case(size, num, 0), searches[min(num, 2)])
        for size in ("8B", "70B")
        for num in COMPARED_WORKERS
    ]
    assert [row["gpus_per_worker"] for row in sizes] == [1, 1, 4, 4]
    assert sizes[1]["dollars"] == pytest.approx(8 * searches[2].seconds / 3600 * 3.0)
    workers = [workers_row(num, (0, 1), found) for num in (1, 2)]
    assert workers[0]["speed_up"] == 1.0
    assert workers[1]["speed_up"] == pytest.approx(searches[1].seconds / searches[2].seconds)
    stages = stage_rows(searches[1], searches[2])
    assert sum(row["share_of_1"] for row in stages) == pytest.approx(1.0)
    tables = {"sizes": sizes, "memory": [memory_row(world, "8B")], "workers": workers, "stages": stages}
    assert all(table(rows).count("\n") == len(rows) + 1 for rows in tables.values())
    plot(tmp_path / "scale.png", sizes, workers)
    assert (tmp_path / "scale.png").stat().st_size > 10_000
