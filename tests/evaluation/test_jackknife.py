"""Values by example, against the examples' own values and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from peft_autoqra.evaluation.jackknife import MAX_GROUPS, example_values
from peft_autoqra.paired import paired_difference


def test_of_a_mean_they_are_the_examples_own_values():
    own = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    values = example_values(lambda chosen: float(own[list(chosen)].mean()), 5)
    np.testing.assert_allclose(values, own, atol=1e-12)


def test_their_mean_is_the_figure_and_their_spread_its_jackknife_standard_error():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(2, size=(2, 40))

    def f1(chosen):
        return float(f1_score(truth[list(chosen)], predicted[list(chosen)]))

    values = example_values(f1, 40)
    assert np.mean(values) == pytest.approx(f1(range(40)))
    left_out = np.array([f1([j for j in range(40) if j != i]) for i in range(40)])
    expected = np.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())  # Efron and Tibshirani 1993, Eq. 11.5
    assert paired_difference([values], [np.zeros(40)]).standard_error == pytest.approx(expected)


def test_many_examples_are_left_out_in_groups():
    own = np.random.default_rng(0).normal(size=10 * MAX_GROUPS)
    num_calls = 0

    def mean(chosen):
        nonlocal num_calls
        num_calls += 1
        return float(own[list(chosen)].mean())

    values = example_values(mean, len(own))
    assert len(values) == MAX_GROUPS == num_calls - 1
    np.testing.assert_allclose(values, own.reshape(MAX_GROUPS, 10).mean(axis=1), atol=1e-9)


def test_one_example_and_figures_that_are_not_finite():
    assert example_values(lambda chosen: 0.25, 1) == (0.25,)
    with pytest.raises(ArithmeticError, match="nan"):
        example_values(lambda chosen: float("nan") if len(chosen) < 3 else 1.0, 3)
