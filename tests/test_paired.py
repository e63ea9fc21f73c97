import math

import numpy as np
import pytest
from scipy import stats

from peft_autoqra.paired import paired_difference


def losses(num_seeds=1, num_sequences=12, seed=0):
    rng = np.random.default_rng(seed)
    shared = rng.normal(3, 1, size=num_sequences)
    return [shared + 0.1 * rng.normal(size=(num_seeds, num_sequences)) for _ in range(2)]


def test_one_seed_is_the_paired_t_test():
    first, second = losses()
    ours, reference = paired_difference(first, second), stats.ttest_rel(first[0], second[0])
    assert ours.interval == pytest.approx(reference.confidence_interval(0.95))
    assert ours.mean / ours.standard_error == pytest.approx(reference.statistic)
    assert ours.degrees_of_freedom == pytest.approx(reference.df)


@pytest.mark.parametrize("shift", [-0.02, -0.3])
def test_better_where_the_one_sided_test_says_so(shift):
    first, second = losses(num_sequences=8)
    difference = paired_difference(first + shift, second)
    p_value = stats.ttest_rel(first[0] + shift, second[0], alternative="less").pvalue
    assert difference.is_better() == (p_value < 0.025)
    assert not paired_difference(second, first + shift).is_better()


def test_seeds_and_sequences_by_hand():
    first, second = losses(num_seeds=3)
    ours, d = paired_difference(first, second), first - second
    by_seed, by_sequence = d.mean(axis=1).var(ddof=1) / 3, d.mean(axis=0).var(ddof=1) / 12
    assert ours.mean == pytest.approx(d.mean())
    assert ours.standard_error == pytest.approx(math.sqrt(by_seed + by_sequence))
    assert ours.degrees_of_freedom == pytest.approx(
        (by_seed + by_sequence) ** 2 / (by_seed**2 / 2 + by_sequence**2 / 11)
    )
    assert ours.num_seeds == 3


@pytest.mark.parametrize(("seed_noise", "sequence_noise"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.3, 1.0)])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_interval_covers_the_truth(seed_noise, sequence_noise, num_seeds):
    """Other seeds and other sequences; hardest where seeds differ far more than sequences, with few seeds."""
    rng, covered, num = np.random.default_rng(0), 0, 1000
    for _ in range(num):
        d = 0.5 + seed_noise * rng.normal(size=(num_seeds, 1)) + sequence_noise * rng.normal(size=(1, 24))
        d = d + 0.5 * rng.normal(size=(num_seeds, 24))
        low, high = paired_difference(d, np.zeros_like(d)).interval
        covered += low <= 0.5 <= high
    assert covered / num > {2: 0.85, 3: 0.9, 5: 0.92}[num_seeds]


def test_one_sequence_says_nothing():
    difference = paired_difference([[1.0]], [[2.0]])
    assert difference.interval == (-math.inf, math.inf)
    assert not difference.is_better()


def test_seeds_alone():
    difference = paired_difference([[1.0], [1.2], [1.1]], [[2.0], [2.0], [2.0]])
    reference = stats.ttest_1samp([-1.0, -0.8, -0.9], 0).confidence_interval(0.95)
    assert difference.interval == pytest.approx(reference)


def test_no_noise_is_exact():
    difference = paired_difference([[1.0, 2.0]], [[1.5, 2.5]])
    assert difference.interval == (-0.5, -0.5)
    assert difference.is_better()
    assert not paired_difference([[1.0, 2.0]], [[1.0, 2.0]]).is_better()


@pytest.mark.parametrize(("first", "second"), [([], []), ([[]], [[]]), ([1.0], [2.0])])
def test_shapes_that_cannot_be_compared(first, second):
    with pytest.raises(ValueError, match=r"num_seeds, num_sequences"):
        paired_difference(first, second)
    with pytest.raises(ValueError):  # noqa: PT011 - NumPy's own words
        paired_difference([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
