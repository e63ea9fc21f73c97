"""Allocators of the fine-tuning benchmark: their plans load, train and keep the budget to the byte."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from peft import get_peft_model

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.method import NotApplicable
from benchmarks.finetune.methods.autoqra import AutoQRA, AutoQRAAllocation
from benchmarks.finetune.methods.published import BIT_CHOICES, RANK_CHOICES, Published, published_fidelities
from benchmarks.finetune.methods.sequential import Sequential, bits_problem, common_rank
from benchmarks.finetune.methods.uniform import Uniform
from benchmarks.finetune.methods.uniform_like import UniformLike, bits_and_rank
from benchmarks.finetune.search_of import Calibrated, searcher_of
from peft_autoqra import AutoQRAConfig, AutoQRASearchConfig, AutoQRASearcher, BitRankPlan, MemoryModel
from peft_autoqra.errors import SearchBudgetError
from peft_autoqra.importance.allocation import allocate
from peft_autoqra.memory_measurement import measure_memory
from peft_autoqra.search_costs import SearchCosts
from tests.benchmarks.tiny_prompt_setting import TinySetting

BUDGET = "qlora-4bit-r16"
CHEAP = [
    Uniform(), Uniform(calibrated=False), UniformLike(), UniformLike(calibrated=False), Sequential(),
    AutoQRAAllocation(), AutoQRAAllocation(quantizer="gptq"),
]  # fmt: skip


@pytest.fixture(scope="module")
def setting(tiny_llama, tmp_path_factory):
    return TinySetting(make_base=tiny_llama, cache_dir=tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def short(setting):
    """Little to train in a trial."""
    return replace(setting, recipe=replace(setting.recipe, max_steps=40))


@pytest.fixture(scope="module")
def calibrated(setting):
    return Calibrated.of(searcher_of(setting, BUDGET, setting.folder / "none"))


def trained_bytes(setting, folder):
    """What is there after a training step, tensor by tensor."""
    base = setting.load_base()
    model = get_peft_model(base, AutoQRAConfig(plan=folder, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return measure_memory(model, list(BitRankPlan.from_pretrained(folder)), optimizer)


@pytest.mark.parametrize("budget", [BUDGET, "stored:qlora-2.5bit-r16"])
@pytest.mark.parametrize("allocator", CHEAP, ids=lambda allocator: allocator.name)
def test_plans_keep_their_budget_to_the_byte(setting, allocator, budget, tmp_path):
    spent = allocator.allocate(setting, budget, tmp_path / "plan")
    plan = BitRankPlan.from_pretrained(tmp_path / "plan")
    memory_model = MemoryModel.from_model(setting.load_base())
    limit = limit_of(budget, memory_model)
    assert set(plan) == set(memory_model.modules)
    measured = trained_bytes(setting, tmp_path / "plan")
    assert measured == memory_model.estimate(plan) == plan.memory
    assert measured.in_scope(limit.scope) <= limit.limit_bytes
    assert spent.trials == 0
    assert (spent.cost > 0) == (allocator.name != "uniform-like-zero")


def test_a_calibration_found_in_the_cache_costs_what_it_took(setting, calibrated, tmp_path):
    first, again = (AutoQRAAllocation().allocate(setting, BUDGET, tmp_path / name) for name in "ab")
    assert calibrated.seconds > 0
    assert first.cost == again.cost == calibrated.setup.costs.calibration
    assert min(first.seconds, again.seconds) >= calibrated.seconds


# ------------------------------------------------------------------------------------------------------------- uniform
def test_uniform_is_the_best_of_the_largest_feasible_ranks(setting, calibrated, tmp_path):
    Uniform().allocate(setting, BUDGET, tmp_path)
    layers = set(BitRankPlan.from_pretrained(tmp_path).values())
    problem = calibrated.problem
    largest = {}
    for bits, rank in product(problem.space.bit_choices, problem.space.rank_choices[1:]):
        if problem.is_feasible(problem.space.uniform(bits, rank)):
            largest[bits] = problem.space.uniform(bits, rank)
    expected = min(largest.values(), key=problem.predicted_loss)
    assert layers == set(problem.space.decode(expected).values())


def test_zero_starts_differ_in_calibration_alone(setting, tmp_path):
    for kind in (Uniform, UniformLike):
        plans = []
        for calibrated in (True, False):
            folder = tmp_path / f"{kind.__name__}-{calibrated}"
            kind(calibrated=calibrated).allocate(setting, "qlora-3bit-r4", folder)
            plans.append(BitRankPlan.from_pretrained(folder))
        assert dict(plans[0]) == dict(plans[1])
        assert plans[0].calibration.corrections
        assert plans[1].calibration is None
        assert [plan.initialization for plan in plans] == ["compensate", "zero"]


def test_half_bits_alternate_over_layers(setting, tmp_path):
    UniformLike(calibrated=False).allocate(setting, "qlora-2.5bit-r8", tmp_path)
    plan = BitRankPlan.from_pretrained(tmp_path)
    assert plan.average_bits == 2.5
    assert {name.split(".")[2]: layer.bits for name, layer in plan.items()} == {"0": 2, "1": 3}
    assert {layer.rank for layer in plan.values()} == {plan.provenance["rank"]}
    assert plan.provenance["wanted_rank"] == 8
    larger = {name: replace(layer, rank=layer.rank + 1) for name, layer in plan.items()}
    memory_model = MemoryModel.from_model(setting.load_base())
    limit = limit_of("qlora-2.5bit-r8", memory_model).limit_bytes
    assert plan.provenance["rank"] == 8 or memory_model.estimate(larger, plan.quantizer).total_bytes > limit


@pytest.mark.parametrize("budget", ["0.75*qlora-4bit-r16", "3.2bit", "qlora-3.7bit-r16", "qlora-5bit-r16", "6GB"])
def test_budgets_without_native_bits_and_a_rank_are_not_for_uniform_like(budget):
    with pytest.raises(NotApplicable):
        bits_and_rank(budget)


# ---------------------------------------------------------------------------------------------------------- sequential
def test_sequential_has_one_rank_and_the_best_bits_for_it(setting, calibrated, tmp_path):
    Sequential().allocate(setting, BUDGET, tmp_path)
    plan, problem = BitRankPlan.from_pretrained(tmp_path), calibrated.problem
    assert {layer.rank for layer in plan.values()} == {16}
    chosen = problem.space.encode(plan)
    without_adapter, num_bits = bits_problem(problem, 16), len(problem.space.bit_choices)
    for index, bit in product(range(len(chosen)), range(num_bits)):
        changed = (*chosen[:index], (bit, chosen[index][1]), *chosen[index + 1 :])
        better = without_adapter.predicted_loss(changed) < without_adapter.predicted_loss(chosen) - 1e-9
        assert not (better and problem.is_feasible(changed))
    assert problem.total_bytes(chosen) <= problem.budget_bytes


@pytest.mark.parametrize("feasible_rank", [4, 8, 16, 32])
def test_the_common_rank_leaves_three_bits(calibrated, feasible_rank):
    problem = calibrated.problem
    limit = problem.total_bytes(problem.space.uniform(3, feasible_rank))
    assert common_rank(replace(problem, budget_bytes=limit)) == min(feasible_rank, 16)
    tight = replace(problem, budget_bytes=problem.total_bytes(problem.space.uniform(2, 4)))
    assert common_rank(tight) == 4
    with pytest.raises(NotApplicable, match="no room"):
        common_rank(replace(tight, budget_bytes=tight.budget_bytes - 1))


# ------------------------------------------------------------------------------------------------------------ searches
def test_published_spends_no_more_than_its_cost_on_its_own_ladders(short, tmp_path):
    spent = Published(max_cost=2.8).allocate(short, BUDGET, tmp_path)
    plan = BitRankPlan.from_pretrained(tmp_path)
    memory_model = MemoryModel.from_model(short.load_base())
    assert 2.0 < spent.cost <= 2.8
    assert spent.trials > 8
    assert {layer.bits for layer in plan.values()} <= set(BIT_CHOICES)
    assert {layer.rank for layer in plan.values()} <= set(RANK_CHOICES)
    for layer in ("model.layers.0.", "model.layers.1."):
        assert len({choice for name, choice in plan.items() if name.startswith(layer)}) == 1
    measured = trained_bytes(short, tmp_path)
    assert measured == memory_model.estimate(plan)
    assert measured.total_bytes <= limit_of(BUDGET, memory_model).limit_bytes


def test_published_refuses_too_little_cost_before_it_calibrates(setting, tmp_path):
    with pytest.raises(SearchBudgetError, match="too little for the published search"):
        Published(max_cost=0.1).allocate(replace(setting, cache_dir=tmp_path), BUDGET, tmp_path / "plan")
    assert list(tmp_path.rglob("*.seconds")) == []


@pytest.mark.parametrize(("steps", "expected"), [(1000, (5, 100)), (40, (0, 4)), (5, (0, 1))])
def test_published_fidelities_are_its_shares_of_a_fine_tune(steps, expected):
    costs = SearchCosts(full_steps=steps, step_tokens=256, eval_tokens=32, calibration_tokens=0, fit_tokens=0)
    low, high = published_fidelities(costs, 64)
    assert (low.num_steps, high.num_steps) == expected
    assert low.num_eval_sequences == high.num_eval_sequences
    assert costs.scoring(high.num_eval_sequences) < costs.steps(high.num_steps)


def test_autoqra_is_the_search_that_a_user_starts(short, tmp_path):
    spent = AutoQRA(max_cost=2.6).allocate(short, BUDGET, tmp_path / "plan")
    plan = BitRankPlan.from_pretrained(tmp_path / "plan")
    result = AutoQRASearcher(
        short.load_base(),
        train_dataset=short.task.train,
        eval_dataset=short.task.dev,
        args=short.recipe.sft_config(tmp_path / "sft"),
        search_config=AutoQRASearchConfig(memory_budget=BUDGET, max_cost=2.6, output_dir=str(tmp_path / "user")),
        processing_class=short.tokenizer,
        show_progress=False,
    ).run()
    assert dict(plan) == dict(result.plan)
    assert plan.calibration.digest == result.plan.calibration.digest
    assert (spent.trials, spent.cost) == (len(result.trials), result.cost)
    assert spent.cost <= 2.6
    found = json.loads((tmp_path / "plan-search" / "search_result.json").read_text())
    assert found["num_trials"] == spent.trials
    measured = trained_bytes(short, tmp_path / "plan")
    assert measured.total_bytes <= result.budget.limit_bytes


def test_the_allocation_alone_is_exact(setting, calibrated, tmp_path):
    AutoQRAAllocation().allocate(setting, BUDGET, tmp_path)
    plan = BitRankPlan.from_pretrained(tmp_path)
    problem = calibrated.problem
    assert problem.space.encode(plan) == allocate(problem)


@pytest.mark.parametrize("allocator", [*CHEAP[:2], *CHEAP[4:], Published(), AutoQRA()], ids=lambda each: each.name)
def test_budgets_without_room_for_an_adapter_are_not_applicable(setting, allocator, tmp_path):
    with pytest.raises(NotApplicable):
        allocator.allocate(setting, "0.05*qlora-4bit-r16", tmp_path)


def test_names_tell_variants_apart():
    allocators = [*CHEAP, AutoQRA(), AutoQRA(quantizer="gptq"), AutoQRA(max_cost=3.0), Published(), Published(4.0)]
    assert [allocator.name for allocator in allocators] == [
        "uniform", "uniform-zero", "uniform-like", "uniform-like-zero", "sequential", "autoqra-allocation",
        "autoqra-allocation-gptq", "autoqra", "autoqra-gptq", "autoqra-cost3", "published", "published-cost4",
    ]  # fmt: skip
