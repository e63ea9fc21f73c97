import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_autoqra import AutoQRASearchConfig
from peft_autoqra.errors import SearchBudgetError
from peft_autoqra.search.ledger import Request
from peft_autoqra.search_costs import SearchCosts
from peft_autoqra.search_ladder import build_ladder
from peft_autoqra.trial import Fidelity


def make_costs(full_steps=1000, step_tokens=4000.0, eval_tokens=250.0):
    return SearchCosts(
        full_steps=full_steps,
        step_tokens=step_tokens,
        eval_tokens=eval_tokens,
        calibration_tokens=16_000.0,
        fit_tokens=200_000.0,
    )


def build(costs, num_baselines=3, seed=0, **settings):
    return build_ladder(AutoQRASearchConfig(**settings), costs, seed=seed, num_baselines=num_baselines)


def test_one_fine_tune_gives_three_fidelities_and_room_for_all_stages():
    costs = make_costs()
    ladder = build(costs)
    steps = [fidelity.num_steps for fidelity in ladder.fidelities]
    assert steps[0] == 0
    assert steps[1] == steps[2] // 3
    assert len({fidelity.num_eval_sequences for fidelity in ladder.fidelities}) == 1
    assert ladder.final == ladder.fidelities[-1]
    assert ladder.spending.level_costs == tuple(costs.trial(fidelity) for fidelity in ladder.fidelities)
    assert ladder.spending.total_cost + ladder.calibration_cost == 1.0
    plan = ladder.spending
    assert min(plan.num_warm, plan.num_evolved, *plan.num_promoted, plan.num_explored, plan.confirmation[1]) > 0


def test_scoring_takes_the_smaller_part_of_a_trial():
    costs = make_costs(eval_tokens=4000.0)
    final = build(costs, num_eval_sequences=500).final
    assert 8 <= final.num_eval_sequences < 500
    assert costs.scoring(final.num_eval_sequences) <= 0.4 * costs.trial(final) * 1.01


def test_short_fine_tunes_are_not_exceeded():
    ladder = build(make_costs(full_steps=4, step_tokens=10_000.0), max_cost=1000.0)
    assert ladder.final.num_steps == 4
    assert [fidelity.num_steps for fidelity in ladder.fidelities] == [0, 4]  # a third of four steps trains nothing


def test_requests_become_fidelities():
    ladder = build(make_costs(), seed=7, learning_rate_factors=[1.0, 3.0])
    level = len(ladder.fidelities) - 1
    request = Request(((0, 0),), level, "confirmation", seed=2, variant=1)
    final = ladder.final
    assert ladder.fidelity(request) == Fidelity(
        final.num_steps, final.num_eval_sequences, seed=9, learning_rate_factor=3.0
    )
    assert ladder.fidelity(Request(((0, 0),), 0, "evolution")) == ladder.fidelities[0]


def test_settings_reach_the_spending():
    plan = build(make_costs(), num_seeds=2, max_trials=33, learning_rate_factors=[1.0, 2.0], num_baselines=3).spending
    assert (plan.num_seeds, plan.max_trials, plan.num_variants, plan.num_baselines) == (2, 33, 2, 3)


@settings(max_examples=200, deadline=None)
@given(
    full_steps=st.integers(1, 3000),
    step_tokens=st.floats(10, 1e5),
    eval_tokens=st.floats(1, 1e4),
    num_eval_sequences=st.integers(1, 300),
    max_cost=st.floats(1e-3, 2.0),
    num_baselines=st.integers(1, 3),
)
def test_a_refused_budget_names_one_that_suffices(
    full_steps, step_tokens, eval_tokens, num_eval_sequences, max_cost, num_baselines
):
    costs, chosen = make_costs(full_steps, step_tokens, eval_tokens), {"num_eval_sequences": num_eval_sequences}
    try:
        ladder = build(costs, num_baselines, max_cost=max_cost, **chosen)
    except SearchBudgetError as error:
        least = float(re.search(r"at least ([0-9.e+-]+),", str(error))[1])
        assert least > max_cost
        longer = int(re.search(r"at least ([0-9,]+) steps", str(error))[1].replace(",", ""))
        assert longer > full_steps
        build(make_costs(longer, step_tokens, eval_tokens), num_baselines, max_cost=max_cost, **chosen)
        ladder = build(costs, num_baselines, max_cost=least, **chosen)
        max_cost = least
    plan = ladder.spending
    assert plan.num_at(len(plan.level_costs) - 1) >= num_baselines
    assert plan.total_cost >= num_baselines * plan.level_costs[-1]
    assert ladder.calibration_cost + plan.total_cost == pytest.approx(max_cost)
    assert 1 <= ladder.final.num_steps <= full_steps
