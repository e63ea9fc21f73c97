import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_autoqra.search.spending import plan_spending

COSTS = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=3).map(sorted)


@settings(max_examples=300, deadline=None)
@given(
    costs=COSTS,
    total=st.floats(0.0, 100.0),
    max_trials=st.none() | st.integers(1, 200),
    num_baselines=st.integers(1, 4),
    num_seeds=st.integers(1, 5),
    num_variants=st.integers(1, 3),
)
def test_all_stages_together_fit_beside_baselines_and_confirmation(
    costs, total, max_trials, num_baselines, num_seeds, num_variants
):
    plan = plan_spending(
        costs,
        total,
        max_trials=max_trials,
        num_baselines=num_baselines,
        num_seeds=num_seeds,
        num_variants=num_variants,
    )
    top = len(costs) - 1
    cost, num = plan.confirmation
    assert 0 <= cost <= 0.5 * total
    assert cost == num * costs[-1]
    counts = [plan.num_warm, plan.num_evolved, *plan.num_promoted, plan.num_explored]
    assert min(counts) >= 0
    cheap = (plan.num_warm + plan.num_evolved) * costs[0]
    between = sum(num * cost for num, cost in zip(plan.num_promoted, costs[1:], strict=top > 0))
    explored = cheap + between
    assert explored <= max(0.0, total - cost - num_baselines * costs[-1]) + 1e-9
    assert plan.num_explored * costs[-1] <= total - cost + 1e-9
    assert sum(plan.num_at(level) * cost for level, cost in enumerate(costs[:-1])) <= explored + sum(costs[:-1]) + 1e-9
    if max_trials is not None:
        exploring = max(0, max_trials - num - num_baselines - top)
        assert sum(counts[:-1]) <= exploring
        assert plan.num_explored <= exploring
    if explored > 0:
        assert sum(plan.num_at(level) * cost for level, cost in enumerate(costs)) <= total * (1 + 1e-9)


def test_confirmation_leaves_room_for_seeds_and_learning_rates():
    plan = plan_spending((0.1, 1.0), 100.0, num_baselines=3, num_seeds=3, num_variants=2)
    assert plan.confirmation[1] == 2 * 2 + (plan.num_finalists + 3) * 1
    assert plan_spending((1.0,), 100.0, num_seeds=1).confirmation == (0.0, 0)


def test_leaving_out_fidelities_keeps_limits_and_seeds():
    plan = plan_spending((0.1, 1.0), 30.0, max_trials=20, num_baselines=3, num_seeds=2, num_variants=2)
    left = plan.without("fidelities", "trust_region")
    assert left.level_costs == (1.0,)
    assert (left.total_cost, left.max_trials, left.num_seeds, left.num_variants, left.num_baselines) == (
        30,
        20,
        2,
        2,
        3,
    )
    assert left.num_explored == 0
    assert left.num_evolved > 0


@pytest.mark.parametrize("costs", [(), (0.0, 1.0), (2.0, 1.0), (-1.0,)])
def test_costs_ascend_from_above_zero(costs):
    with pytest.raises(ValueError, match="positive and ascending"):
        plan_spending(costs, 10.0)
