import numpy as np

from peft_autoqra.search.neighborhood import (
    Region,
    keys,
    local_search,
    paired_edits,
    single_edits,
    total_bytes,
)
from tests.search.synthetic import brute_force, make_problem


def predicted(problem):
    def score(positions):
        return np.array([-problem.predicted_loss(problem.space.from_array(position)) for position in positions])

    return score


def test_single_edits_hold_every_atomic_edit():
    problem = make_problem(4, max_rank=16)
    candidate = ((0, 0), (4, 3), (2, 1), (1, 3))
    edits = {problem.space.from_array(edit) for edit in single_edits(problem, np.asarray(candidate))}
    assert set(problem.space.neighbors(candidate)) <= edits
    assert all(problem.space.contains(edit) for edit in edits)


def test_pairs_keep_the_budget():
    problem = make_problem(8, budget_fraction=0.3)
    position = np.asarray(problem.smallest_candidate())
    position[:4, 0] += 1
    edits = single_edits(problem, position)
    pairs = paired_edits(problem, position, edits, np.zeros(len(edits)))
    assert (total_bytes(problem, pairs) <= problem.budget_bytes).all()
    assert all(problem.space.contains(problem.space.from_array(pair)) for pair in pairs)


def test_climbs_close_to_the_optimum():
    problem = make_problem(5, seed=2, budget_fraction=0.3, bit_choices=(2, 3, 4), rank_choices=(0, 8, 16))
    start = np.asarray(problem.smallest_candidate())
    found, value = local_search(Region(problem, start, 1000, frozenset()), start, predicted(problem))
    assert -value <= 1.2 * brute_force(problem, problem.predicted_loss)[0]
    assert -value == problem.predicted_loss(problem.space.from_array(found))


def test_never_returns_what_is_taken_or_far():
    problem = make_problem(5, seed=2, budget_fraction=0.3)
    start = np.asarray(problem.smallest_candidate())
    taken = set(keys(start[None]))
    for _ in range(10):
        found, value = local_search(Region(problem, start, 2, taken), start, predicted(problem))
        assert np.isfinite(value)
        assert np.abs(found - start).sum() <= 2
        assert keys(found[None])[0] not in taken
        taken.add(keys(found[None])[0])


def test_exhausted_region_scores_minus_infinity():
    problem = make_problem(1, bit_choices=(4,), rank_choices=(8,))
    start = np.zeros((1, 2), dtype=np.int64)
    assert local_search(Region(problem, start, 5, set(keys(start[None]))), start, predicted(problem))[1] == -np.inf
