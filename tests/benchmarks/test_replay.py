"""Recorded tables: reading, snapping, costs."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.search.replay import load_replays
from benchmarks.search.run import PoolEmpty, Run
from peft_autoqra.importance.rank_demand import rank_demand
from tests.benchmarks.recorded_table import write_table


@pytest.fixture
def table(tmp_path):
    problem, candidates = write_table(tmp_path)
    return load_replays(tmp_path)["real-3bit"], problem, candidates


def test_reads_what_was_recorded(tmp_path):
    problem, candidates = write_table(tmp_path)
    replays = load_replays(tmp_path)
    assert list(replays) == ["real-3bit"]  # nothing was recorded at 2 bits yet
    replay = replays["real-3bit"]
    assert replay.pool == tuple(candidates)
    assert replay.problem.budget_bytes == problem.budget_bytes
    assert [replay.problem.total_bytes(c) for c in candidates] == [problem.total_bytes(c) for c in candidates]
    recorded = problem.loss_table + rank_demand(problem.space)[:, None, :]
    assert np.array_equal(replay.problem.loss_table, recorded)  # the table holds the error left alone


def test_costs_count_training_and_evaluation(table):
    replay, _, _ = table
    # 12 steps of 256 tokens and 24 sequences of 64 tokens at half a training token each
    assert replay.level_costs == pytest.approx([768 / 3840, 1792 / 3840, 1.0])


def test_the_search_sees_half_of_the_sequences(table):
    replay, _, candidates = table
    losses = replay.sequence_losses[-1, 3]
    evaluation = replay.evaluate(candidates[3], 2)
    assert evaluation.sequence_losses == tuple(losses[:24])
    assert evaluation.loss == pytest.approx(losses[:24].mean())
    assert replay.true_loss(candidates[3]) == pytest.approx(losses.mean())
    assert replay.optimum_loss == pytest.approx(replay.sequence_losses[-1].mean(axis=1).min())


def test_a_recorded_plan_is_itself_and_others_are_snapped(table):
    replay, problem, candidates = table
    assert [replay.resolve(candidate, set()) for candidate in candidates] == candidates
    proposal = problem.smallest_candidate()
    sizes = problem.bytes_table

    def distance(candidate):
        return sum(
            abs(int(sizes[g, b, 0] - sizes[g, p, 0])) + abs(int(sizes[g, 0, r] - sizes[g, 0, q]))
            for g, ((b, r), (p, q)) in enumerate(zip(candidate, proposal, strict=True))
        )

    by_distance = sorted(candidates, key=distance)
    assert replay.resolve(proposal, set()) == by_distance[0]
    assert replay.resolve(proposal, set(by_distance[:4])) == by_distance[4]


def test_snapping_never_repeats_within_a_level(table):
    replay, problem, candidates = table
    run = Run(replay, budget=100.0)
    for level in (0, 2):
        snapped = [run.evaluate(problem.smallest_candidate(), level)[0] for _ in candidates]
        assert sorted(snapped) == sorted(candidates)
        with pytest.raises(PoolEmpty):
            run.evaluate(problem.smallest_candidate(), level)
    assert run.records[-1].recommendation == min(candidates, key=replay.true_loss)
    assert run.regrets()[-1][1] == 0.0
