"""Statistics of the fine-tuning benchmark beside what NumPy and SciPy say of the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.finetune.cell_runs import CellRuns, MixedSettings, runs_by_cell
from benchmarks.finetune.claims import Claim, all_claims, check_memory
from benchmarks.finetune.comparison import (
    gap_closed,
    loss_above_mark,
    loss_difference,
    median_loss,
    median_metric,
    metric_difference,
)
from benchmarks.finetune.figures import seeds_of, signed, with_interval
from benchmarks.finetune.records import Record
from tests.benchmarks.synthetic_records import (
    BUDGET,
    CONFIG,
    all_records,
    cell,
    memory,
    record,
    split,
    write_config,
)

REVIEWS = [("reviews", "autoqra", BUDGET), ("reviews", "qlora-r16", None), ("reviews", "lora-r16", None)]


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def cells(config):
    return runs_by_cell(config, all_records())


def runs_of(losses: np.ndarray, seeds=(0, 1, 2), right: str = "") -> CellRuns:
    """A cell with losses ``[num_seeds, num_examples]``."""
    runs = {seed: record("m", 0.0, seed=seed, test=split(row, right)) for seed, row in zip(seeds, losses, strict=True)}
    return CellRuns(cell=("reviews", "m", None), learning_rate=0.001, runs=runs, swept={}, num_diverged=0)


def three_cells(num_seeds: int, gap: float = 0.1, closed: float = 0.7) -> tuple[CellRuns, CellRuns, CellRuns]:
    rng = np.random.default_rng(num_seeds)
    shared = rng.normal(2, 0.5, (num_seeds, 60))
    noise = rng.normal(0, 0.03, (3, num_seeds, 60)) + rng.normal(0, 0.004, (3, num_seeds, 1))
    means = (-closed * gap, 0.0, -gap)
    own, low, high = (runs_of(shared + mean + n, range(num_seeds)) for mean, n in zip(means, noise, strict=True))
    return own, low, high


def losses(runs: CellRuns) -> np.ndarray:
    return np.array([record.test.losses for record in runs.records])


# ----------------------------------------------------------------------------------------------------------- selection
def test_the_learning_rate_is_the_best_of_the_first_seed_on_the_development_split(config):
    records = [
        record("qlora-r16", 2.0, rate=0.001, dev=1.0),
        record("qlora-r16", 3.0, rate=0.002, dev=0.9),  # better on dev, worse on test
        record("qlora-r16", 3.1, rate=0.002, seed=1, dev=9.0),
        record("qlora-r16", 2.1, rate=0.001, seed=1, dev=0.1),  # of another seed
    ]
    (runs,) = runs_by_cell(config, records).values()
    assert runs.learning_rate == 0.002
    assert runs.records == [records[1], records[2]]
    assert runs.swept == {0.001: records[0], 0.002: records[1]}


def test_a_cell_is_shown_once_all_learning_rates_were_tried(config):
    first, second, *_ = cell("qlora-r16", 2.0)
    assert runs_by_cell(config, [first]) == {}
    assert len(runs_by_cell(config, [first, second])) == 1


def test_a_cell_is_shown_once_its_best_learning_rate_is_inside_of_the_sweep(tmp_path):
    config = write_config(tmp_path, text=CONFIG.replace("[0.001, 0.002]", "[0.001, 0.002, 0.004]"))
    tried = [record("qlora-r16", loss, rate=rate) for rate, loss in ((0.001, 2.2), (0.002, 2.1), (0.004, 2.0))]
    assert runs_by_cell(config, tried) == {}
    (runs,) = runs_by_cell(config, [*tried, record("qlora-r16", 2.3, rate=0.008)]).values()
    assert (runs.learning_rate, sorted(runs.swept)) == (0.004, [0.001, 0.002, 0.004, 0.008])


def test_diverged_runs_are_counted_and_lose(config):
    diverged = record("qlora-r16", 0.0, rate=0.002, status="diverged", dev=None, test=None, memory=None)
    diverged = replace(diverged, dev=None)
    (runs,) = runs_by_cell(config, [record("qlora-r16", 2.0, rate=0.001), diverged]).values()
    assert (runs.learning_rate, runs.num_diverged, len(runs.runs)) == (0.001, 1, 1)
    both = [diverged, replace(diverged, run=replace(diverged.run, learning_rate=0.001))]
    (runs,) = runs_by_cell(config, both).values()
    assert (runs.learning_rate, runs.num_diverged, runs.records) == (None, 2, [])


def test_records_of_other_configurations_are_left_out_and_those_of_another_recipe_refused(config):
    records = cell("qlora-r16", 2.0)
    other = replace(records[0], run=replace(records[0].run, config="other"), digest="other")
    assert list(runs_by_cell(config, [*records, other])) == [("reviews", "qlora-r16", None)]
    with pytest.raises(MixedSettings, match=r"different recipes or data.*name the changed configuration anew"):
        runs_by_cell(config, [*records, replace(records[0], run=replace(records[0].run, seed=7), digest="other")])


def test_cells_come_in_the_order_of_the_tables(config):
    records = [r for name in ("unknown", "autoqra", "qlora-r16", "lora-r16") for r in cell(name, 2.0)]
    assert [method for _, method, _ in runs_by_cell(config, records)] == [
        "lora-r16",
        "qlora-r16",
        "autoqra",
        "unknown",
    ]


# ------------------------------------------------------------------------------------------------------------- effects
@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
def test_loss_differences_are_those_of_scipy(num_seeds):
    own, low, _ = three_cells(num_seeds)
    differences = losses(own) - losses(low)
    effect = loss_difference(own, low)
    assert effect.value == pytest.approx(np.median(differences.mean(axis=1)))
    assert (effect.num_seeds, effect.num_examples) == (num_seeds, 60)
    parts = [(stats.sem(differences.mean(axis=0)) ** 2, 59)]
    if num_seeds > 1:
        parts.append((stats.sem(differences.mean(axis=1)) ** 2, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    expected = stats.t.interval(0.95, freedom, loc=differences.mean(), scale=math.sqrt(variance))
    assert effect.interval == pytest.approx(expected)


def test_only_common_seeds_are_compared():
    rng = np.random.default_rng(0)
    first, second = runs_of(rng.normal(size=(3, 9)), (0, 1, 2)), runs_of(rng.normal(size=(2, 9)), (0, 2))
    expected = np.median((losses(first)[[0, 2]] - losses(second)).mean(axis=1))
    effect = loss_difference(first, second)
    assert (effect.value, effect.num_seeds) == (pytest.approx(expected), 2)
    assert loss_difference(first, runs_of(rng.normal(size=(1, 9)), [7])) is None


def test_metrics_are_compared_answer_by_answer():
    first = runs_of(np.zeros((3, 8)), right="11110000")
    second = runs_of(np.zeros((3, 8)), right="11000000")
    effect = metric_difference(first, second)
    assert effect.value == 0.25
    change = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    expected = stats.t.interval(0.95, 7, loc=0.25, scale=stats.sem(change))
    assert effect.interval == pytest.approx(expected)
    assert median_metric(first) == 0.5
    without = runs_of(np.zeros((3, 8)))
    assert metric_difference(without, without) is None
    assert median_metric(without) is None


def test_the_gap_is_a_median_of_ratios_with_fiellers_interval():
    own, low, high = three_cells(1)
    gained, gap = (losses(low) - losses(own))[0], (losses(low) - losses(high))[0]
    effect = gap_closed(own, low, high)
    assert effect.value == pytest.approx(gained.mean() / gap.mean())
    # one seed: the quadratic (mean(x) - share mean(y))^2 = t^2 var(mean(x - share y)) of Fieller
    covariance, t = np.cov(gained, gap) / 60, stats.t.ppf(0.975, 59)
    coefficients = [
        gap.mean() ** 2 - t**2 * covariance[1, 1],
        -2 * (gained.mean() * gap.mean() - t**2 * covariance[0, 1]),
        gained.mean() ** 2 - t**2 * covariance[0, 0],
    ]
    assert effect.interval == pytest.approx(sorted(np.roots(coefficients)))


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_the_gap_excludes_a_share_where_the_difference_from_that_mark_excludes_zero(num_seeds):
    own, low, high = three_cells(num_seeds)
    effect = gap_closed(own, low, high)
    ratios = (losses(low) - losses(own)).mean(axis=1) / (losses(low) - losses(high)).mean(axis=1)
    assert effect.value == pytest.approx(np.median(ratios))
    for end, side in zip(effect.interval, (1, 0), strict=True):  # at its ends the interval of the difference ends in 0
        assert loss_above_mark(own, low, high, share=end).interval[side] == pytest.approx(0, abs=1e-9)
    assert effect.interval[0] < 0.7 < effect.interval[1]


def test_a_gap_that_may_be_none_has_an_unbounded_share_and_no_gap_has_none():
    noise = np.tile([1.0, -1.0], (3, 10))
    low, high, own = runs_of(noise), runs_of(np.full((3, 20), -0.001)), runs_of(np.zeros((3, 20)))
    effect = gap_closed(own, low, high)
    assert (effect.value, effect.interval) == (pytest.approx(0), (-math.inf, math.inf))
    assert gap_closed(own, high, low) is None
    assert loss_above_mark(own, high, low, share=0.8).value == pytest.approx(0.001 - 0.8 * 0.001)


def test_a_gap_that_all_examples_agree_on_is_exact():
    own, low, high = (runs_of(np.full((3, 5), loss)) for loss in (1.2, 1.5, 1.0))
    assert gap_closed(own, low, high).interval == pytest.approx((0.6, 0.6))


# -------------------------------------------------------------------------------------------------------------- claims
def by_text(claims: list[Claim], start: str, task: str) -> Claim:
    (found,) = (claim for claim in claims if claim.text.startswith(start) and claim.task == task)
    return found


def test_claims_are_judged_by_intervals(config, cells):
    claims = all_claims(config, cells, ["reviews", "quartz"])
    gap = [by_text(claims, "closes at least 80%", task) for task in ("reviews", "quartz")]
    assert [(claim.verdict, claim.is_reached) for claim in gap] == [("yes", True), ("no", False)]
    for claim, task in zip(gap, ("reviews", "quartz"), strict=True):
        own, low, high = (losses(cells[(task, *name[1:])]).mean(axis=1) for name in REVIEWS)
        assert claim.effect.value == pytest.approx(np.median((low - own) / (low - high)))
    rival = [by_text(claims, 'better than "sequential', task) for task in ("reviews", "quartz")]
    assert [(claim.verdict, claim.rival) for claim in rival] == [("yes", "sequential"), ("no", "sequential")]
    assert not [claim for claim in claims if claim.rival == "published"]  # was not run
    less = by_text(claims, "no worse than QLoRA", "reviews")
    assert (less.effect, less.is_reached, less.verdict) == (None, None, "not shown")


def test_a_gap_that_some_seed_lacks_is_judged_by_the_loss_at_its_mark(config):
    """The share is not defined there, and the claim must not vanish with it."""
    base = [record for record in all_records() if record.run.task == "reviews" and record.run.method != "lora-r16"]
    upper = [record("lora-r16", loss, rate=0.002, seed=seed, dev=1.0) for seed, loss in enumerate((2.5, 2.5, 2.7))]
    upper.append(record("lora-r16", 3.0, rate=0.001))
    cells = runs_by_cell(config, base + upper)
    gap = by_text(all_claims(config, cells, ["reviews"]), "closes at least 80%", "reviews")
    own, low, high = (cells[("reviews", *name[1:])] for name in REVIEWS)
    assert gap_closed(own, low, high) is None
    assert (gap.figure, gap.effect) == ("loss above the mark", loss_above_mark(own, low, high, share=0.8))
    assert (gap.is_reached, gap.verdict) == (gap.effect.value <= 0, "not shown")


@pytest.mark.parametrize("method", ["autoqra", "qlora-r16"])
def test_a_seed_that_diverged_leaves_nothing_shown(config, method):
    lost = {"status": "diverged", "dev": None, "test": None}
    records = [
        replace(known, **lost) if (known.run.method, known.run.seed) == (method, 2) else known
        for known in all_records()
    ]
    cells = runs_by_cell(config, records)
    assert {cell[1] for cell, runs in cells.items() if runs.lost_seeds == (2,)} == {method}
    gap = by_text(all_claims(config, cells, ["reviews"]), "closes at least 80%", "reviews")
    assert (gap.verdict, gap.effect.num_seeds) == ("not shown", 2)


def test_one_seed_shows_nothing(config):
    first_seed = [record for record in all_records() if record.run.seed == 0]
    claims = all_claims(config, runs_by_cell(config, first_seed), ["reviews"])
    gap = by_text(claims, "closes at least 80%", "reviews")
    assert (gap.is_reached, gap.verdict, gap.effect.num_seeds) == (True, "not shown", 1)


def test_a_difference_within_its_interval_is_not_shown(config):
    budget = "0.75*qlora-4bit-r16"
    records = cell("qlora-r16", 2.6) + cell("autoqra", 2.6, budget=budget)
    (claim,) = (c for c in all_claims(config, runs_by_cell(config, records), ["reviews"]) if c.budget == budget)
    assert claim.verdict == "not shown"
    assert claim.effect.interval[0] < 0 < claim.effect.interval[1]


def test_memory_is_checked_run_by_run_and_part_by_part():
    def with_memory(**changes: int) -> Record:
        return record("autoqra", 2.0, memory=memory(**changes))

    exact, kept = with_memory(), with_memory(budget=190_000_000)
    over = with_memory(budget=190_000_000, measured_more=5)
    check = check_memory([exact, kept, over, record("qlora-r16", 2.0, memory=None)])
    assert (check.num_runs, check.num_exact, check.num_limited, check.num_kept) == (3, 2, 2, 1)
    assert (check.largest_difference, check.part) == (5, "metadata")
    assert check_memory([exact]).part == ""


# ------------------------------------------------------------------------------------------------------------- figures
def test_medians_are_over_seeds(cells):
    runs = cells[REVIEWS[0]]
    assert median_loss(runs) == pytest.approx(np.median(losses(runs).mean(axis=1)))


def test_numbers_as_text():
    assert [signed(value) for value in (0.1234, -0.1236, 0.0004, -0.0004)] == [
        "+0.123",
        "\N{MINUS SIGN}0.124",
        "0.000",
        "0.000",
    ]
    assert [seeds_of(numbers) for numbers in ([], [3, 3], [1, 3])] == ["\N{EN DASH}", "3", "1 to 3"]
    effect = loss_difference(runs_of(np.ones((1, 1)), [0]), runs_of(np.zeros((1, 1)), [0]))
    assert with_interval(effect) == "+1.000 (unbounded)"
    assert with_interval(None) == "\N{EN DASH}"
