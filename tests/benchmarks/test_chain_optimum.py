"""The dynamic programme against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.search.chain_optimum import chain_optimum


def enumerated(unary, pairwise, sizes, capacity):
    groups = range(len(unary))
    chains = itertools.product(range(unary.shape[1]), repeat=len(unary))
    return min(
        (sum(unary[g, c[g]] for g in groups) + sum(pairwise[g, c[g], c[g + 1]] for g in groups[:-1]), c)
        for c in chains
        if sum(sizes[g, c[g]] for g in groups) <= capacity
    )


@pytest.mark.parametrize("seed", range(20))
def test_equals_enumeration(seed):
    rng = np.random.default_rng(seed)
    num_groups, num_choices = int(rng.integers(1, 6)), int(rng.integers(2, 5))
    unary = rng.normal(size=(num_groups, num_choices))
    pairwise = rng.normal(size=(num_groups - 1, num_choices, num_choices))
    sizes = rng.integers(1, 9, size=(num_groups, num_choices))
    capacity = int(sizes.min(axis=1).sum() + rng.integers(0, 12))

    choices, value = chain_optimum(unary, pairwise, sizes, capacity)

    expected, best = enumerated(unary, pairwise, sizes, capacity)
    assert value == pytest.approx(expected, abs=1e-12)
    assert tuple(choices) == best


def test_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="3 units more"):
        chain_optimum(np.zeros((2, 2)), np.zeros((1, 2, 2)), np.array([[4, 5], [4, 6]]), 5)
