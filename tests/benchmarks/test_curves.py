"""Regret curves: steps, intervals, pairs, tables, pictures."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.search.comparison import Job, RegretCurve, append_curve, read_curves, run_job, write_curves
from benchmarks.search.curves import (
    difference_table,
    median_interval,
    paired_difference,
    plot_regrets,
    regret_table,
    select,
)


def curve(method, seed, *regrets, landscape="additive"):
    steps = tuple((float(cost), regret) for cost, regret in enumerate(regrets, 1))
    return RegretCurve(Job(landscape, method, seed, 3.0), steps, 0.5)


def test_a_curve_is_a_step_function():
    regrets = curve("random", 0, 0.5, 0.5, 0.2).at(np.array([0.9, 1.0, 2.9, 3.0, 9.0]))
    assert regrets.tolist() == [np.inf, 0.5, 0.5, 0.2, 0.2]
    assert curve("random", 0).at(np.array([1.0])).tolist() == [np.inf]


def test_median_interval_has_the_coverage_of_order_statistics():
    values = np.arange(11.0)
    interval = median_interval(values)
    # the bootstrap distribution of the median of 11 is known: it is at most x when 6 of 11 draws are
    chance = [1 - binom.cdf(5, 11, (x + 1) / 11) for x in values]
    low, high = (next(x for x, p in zip(values, chance, strict=True) if p >= tail) for tail in (0.025, 0.975))
    assert interval.median == 5.0
    assert (interval.low, interval.high) == (low, high)
    assert interval.excludes_zero
    assert not median_interval(values - 5).excludes_zero


def test_differences_are_paired_by_seed():
    ours = [curve("autoqra", seed, 0.1 * seed + 0.01) for seed in range(8)]
    rival = [curve("random", seed, 0.1 * seed + 0.03) for seed in reversed(range(1, 9))]
    difference = paired_difference(ours, rival)
    assert difference.num_seeds == 7
    bounds = (difference.interval.low, difference.interval.median, difference.interval.high)
    assert bounds == pytest.approx([-0.02] * 3)
    assert difference.p_value == pytest.approx(2 / 2**7)  # all seven of one sign
    assert paired_difference(ours, ours).p_value == 1.0
    assert paired_difference(ours, []) is None


def test_tables():
    curves = [curve(method, seed, loss) for seed in range(5) for method, loss in (("autoqra", 0.1), ("random", 0.4))]
    curves.append(curve("random", 0, 0.2, landscape="noisy"))
    assert regret_table(curves).splitlines() == [
        "| method | additive | noisy |",
        "|---|---|---|",
        "| autoqra | 0.1000 [0.1000, 0.1000] |  |",
        "| random | 0.4000 [0.4000, 0.4000] | 0.2000 [0.2000, 0.2000] |",
    ]
    assert difference_table(curves, "autoqra").splitlines()[2:] == ["| random | **-0.3000 [-0.3000, -0.3000]** |  |"]


def test_picture(tmp_path):
    mpl.use("Agg")
    curves = [
        curve(method, seed, 0.5, 0.5, 0.0, landscape=landscape)
        for method in ("autoqra", "random")
        for seed in range(3)
        for landscape in ("additive", "noisy", "deceptive", "interactions")
    ]
    plot_regrets(curves, tmp_path / "regret.png", "autoqra")
    assert (tmp_path / "regret.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_recorded_and_replaced(tmp_path):
    path = tmp_path / "search" / "runs.jsonl"
    assert read_curves(path) == {}
    first, again, other = curve("random", 0, 0.5), curve("random", 0, 0.4), curve("autoqra", 0, 0.1)
    for row in (first, again, other):
        append_curve(path, row)
    assert read_curves(path) == {again.job: again, other.job: other}
    write_curves(path, list(read_curves(path).values()))
    assert len(path.read_text().splitlines()) == 2
    assert select(list(read_curves(path).values()), "additive", "random") == [again]


def test_a_job_gives_the_regret_of_a_run(tmp_path):
    job = Job("exact-proxy", "allocation", 0, 2.0)
    result = run_job(job, tmp_path)
    assert result.job == job
    assert result.steps == ((1.0, pytest.approx(0.0, abs=1e-6)),)
