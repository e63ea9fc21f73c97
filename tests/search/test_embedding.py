import numpy as np
import pytest

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search.embedding import OrdinalEmbedding
from tests.search.synthetic import make_problem


@pytest.mark.parametrize("num_groups", [1, 5, 210])
def test_distances_do_not_grow_with_the_number_of_groups(num_groups):
    problem = make_problem(num_groups)
    embedding = OrdinalEmbedding(problem, ImportancePriors.from_problem(problem))
    low, high = embedding.transform([problem.space.uniform(2, 0), problem.space.uniform(16, 64)])
    groups = slice(0, embedding.num_group_columns)
    assert np.square(high[groups] - low[groups]).sum() == pytest.approx(2.0)
    assert high.shape == (embedding.num_group_columns + embedding.num_coverage_columns,)


def test_moves_of_important_groups_are_longer():
    problem = make_problem(16)
    importance = ImportancePriors.from_problem(problem)
    embedding = OrdinalEmbedding(problem, importance)
    start = problem.space.uniform(4, 0)

    def step_length(group):
        moved = (*start[:group], (start[group][0] + 1, start[group][1]), *start[group + 1 :])
        return np.linalg.norm(np.diff(embedding.transform([start, moved]), axis=0))

    assert step_length(int(importance.bits.argmax())) > 3 * step_length(int(importance.bits.argmin()))


def test_coverages_are_the_last_columns():
    problem = make_problem(6)
    embedding = OrdinalEmbedding(problem, ImportancePriors.from_problem(problem))
    row = embedding.transform([problem.space.uniform(16, 64)])[0, embedding.num_group_columns :]
    assert row[:2] == pytest.approx([1.0, 1.0])
    assert np.count_nonzero(row[2:]) == 1  # all predicted loss is at 16 bits


def test_predictions_are_the_problems_own():
    problem = make_problem(6)
    embedding = OrdinalEmbedding(problem, ImportancePriors.from_problem(problem))
    candidates = [problem.space.sample(np.random.default_rng(seed)) for seed in range(5)]
    predicted = embedding.predicted_losses(np.asarray(candidates))
    assert predicted == pytest.approx([problem.predicted_loss(candidate) for candidate in candidates])
