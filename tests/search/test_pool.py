import numpy as np

from peft_autoqra.search.pool import CandidatePool
from tests.search.synthetic import make_problem


def test_without_a_pool_every_candidate_is_its_own():
    problem = make_problem(4)
    candidate = problem.smallest_candidate()
    assert CandidatePool(problem).nearest(candidate, taken=[candidate]) == candidate


def test_nearest_by_brute_force():
    problem, rng = make_problem(5, seed=3), np.random.default_rng(0)
    pool = list(dict.fromkeys(problem.space.sample(rng) for _ in range(30)))
    weights = [np.ptp(problem.bytes_table[group]) for group in range(5)]

    def distance(one, other):
        return sum(
            weight * (abs(a[0] - b[0]) + abs(a[1] - b[1])) for weight, a, b in zip(weights, one, other, strict=True)
        )

    for _ in range(20):
        wanted = problem.space.sample(rng)
        found = CandidatePool(problem, pool).nearest(wanted)
        assert distance(found, wanted) == min(distance(candidate, wanted) for candidate in pool)


def test_what_is_taken_gives_way_to_the_next():
    problem, rng = make_problem(5, seed=3), np.random.default_rng(0)
    candidates = list(dict.fromkeys(problem.space.sample(rng) for _ in range(10)))
    pool = CandidatePool(problem, candidates)
    order = []
    while len(order) < len(candidates):
        order.append(pool.nearest(candidates[0], order))
    assert sorted(order) == sorted(candidates)
    assert order[0] == candidates[0]
    assert pool.nearest(candidates[0], order) == candidates[0]  # all taken: the nearest of all
