from dataclasses import replace

import numpy as np
import pytest

from peft_autoqra.search.loss_features import LossFeatures
from peft_autoqra.search_space import ModuleGroup, SearchSpace
from tests.search.synthetic import make_problem


@pytest.fixture(scope="module")
def problem():
    """Six groups of two kinds over three layers."""
    plain = make_problem(6, seed=2, max_rank=16)
    groups = [ModuleGroup(f"layers.{i // 2}.{'qv'[i % 2]}", (f"m{i}",), 16 if i else 64) for i in range(6)]
    return replace(plain, space=SearchSpace(tuple(groups), plain.space.bit_choices, plain.space.rank_choices))


@pytest.fixture(scope="module")
def features(problem):
    return LossFeatures(problem)


def sample(problem, num=7):
    rng = np.random.default_rng(0)
    return np.asarray([problem.space.sample(rng) for _ in range(num)])


def test_columns_by_brute_force(problem, features):
    positions = sample(problem)
    columns = features.transform_positions(positions)
    assert columns.shape == (7, features.num_columns)
    space, table = problem.space, problem.loss_table
    depth = np.linspace(-1, 1, 6)
    for row, candidate in zip(columns, positions, strict=True):
        losses = []
        for group, (bits, rank) in enumerate(candidate):
            least = min(
                table[group, b, r] for b in range(len(space.bit_choices)) for r in range(space.num_ranks(group))
            )
            losses.append(table[group, bits, rank] - least)
        for rung in range(5):
            expected = sum(loss for loss, (bits, _) in zip(losses, candidate, strict=True) if bits == rung)
            assert row[features.columns("bits")][rung] == pytest.approx(expected)
        for rung in range(6):
            at_rank = [rank == rung for _, rank in candidate]
            expected = sum(loss for loss, at in zip(losses, at_rank, strict=True) if at)
            assert row[features.columns("ranks")][rung] == pytest.approx(expected)
            assert row[features.columns("demand")][rung] == pytest.approx(sum(at_rank) / 6)
        assert row[features.columns("kinds")] == pytest.approx([sum(losses[::2]), sum(losses[1::2])])
        slopes = [np.dot(losses, depth), np.dot(losses, (3 * depth**2 - 1) / 2)]
        assert row[features.columns("depth")] == pytest.approx(slopes)
        assert row[features.columns("groups")] == pytest.approx(losses)
        assert row[features.columns("neighbors")] == pytest.approx(np.sqrt(np.multiply(losses[:-1], losses[1:])))


def test_blocks_cover_the_columns_in_order(features):
    for index, name in enumerate(features.BLOCKS):
        assert (features.block_of_column[features.columns(name)] == index).all()
    assert sum(features.columns(name).stop - features.columns(name).start for name in features.BLOCKS) == (
        features.num_columns
    )


def test_corrected_table_is_the_linear_model_summed_over_groups(problem, features):
    rng = np.random.default_rng(1)
    weights, scale, unit = rng.normal(size=features.num_columns), 1.3, 0.7
    weights[features.columns("neighbors")] = 0.0  # what no table can say
    table = features.corrected_table(weights, scale, unit)
    assert table.shape == problem.loss_table.shape
    positions = sample(problem)
    columns = features.transform_positions(positions)
    columns[:, features.columns("demand")] *= unit
    expected = columns @ weights + scale * columns[:, features.columns("groups")].sum(axis=1)
    rows = np.arange(6)
    summed = [table[rows, candidate[:, 0], candidate[:, 1]].sum() for candidate in positions]
    np.testing.assert_allclose(summed, expected)


def test_one_group():
    problem = make_problem(1)
    features = LossFeatures(problem)
    assert features.columns("neighbors").start == features.columns("neighbors").stop
    assert features.transform_positions(sample(problem)).shape == (7, features.num_columns)
