"""Estimated bytes against the bytes of real tensors, and budgets as users write them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_autoqra.errors import AutoQRAError, InvalidPlanError, MemoryBudgetError, PlanMismatchError
from peft_autoqra.granularity import Granularity, build_search_space
from peft_autoqra.memory import MemoryBudget, MemoryModel, ModuleShape, resolve_budget
from peft_autoqra.memory_estimate import MemoryEstimate, MemoryScope
from peft_autoqra.memory_measurement import measure_memory
from peft_autoqra.plan import BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.tuner.config import AutoQRAConfig
from tests.conftest import TinyLlamaFactory

NATIVE, BNB = QuantizerSettings(group_size=32), QuantizerSettings(backend="bitsandbytes")
NO_ADAPTER = MemoryEstimate(
    weight_bytes=0, metadata_bytes=0, untouched_bytes=0, adapter_bytes=0, gradient_bytes=0, optimizer_bytes=0
)


def train_one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(128, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(trained, lr=1e-3)
    return torch.optim.AdamW(trained, lr=1e-3, fused=name == "adamw_torch_fused")


def mixed_layers(names: list[str], bits: tuple[int, ...] = (2, 3, 4, 8, 16)) -> dict[str, LayerPlan]:
    ranks = (0, 1, 4, 7, 16, 3)
    return {name: LayerPlan(bits[i % len(bits)], ranks[i % len(ranks)]) for i, name in enumerate(names)}


# ------------------------------------------------------------------------------------------- estimate and measurement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("quantizer", "bits"), [*((NATIVE, bits) for bits in (2, 3, 4, 8, 16)), *((BNB, bits) for bits in (4, 8, 16))]
)
def test_a_uniform_plan_takes_the_estimated_bytes_after_a_real_step(
    tiny_llama: TinyLlamaFactory, quantizer: QuantizerSettings, bits: int, dtype: torch.dtype
) -> None:
    base = tiny_llama().to(dtype)
    memory_model = MemoryModel.from_model(base)
    plan = BitRankPlan(memory_model.uniform(bits, 4), quantizer=quantizer)
    model = get_peft_model(base, AutoQRAConfig(plan=plan))
    optimizer = make_optimizer("adamw_torch", model)
    train_one_step(model, optimizer)
    assert measure_memory(model, plan, optimizer) == memory_model.estimate(plan)


@pytest.mark.parametrize("optimizer_name", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("quantizer", "bits"), [(NATIVE, (2, 3, 4, 8, 16)), (BNB, (4, 8, 16))])
def test_a_mixed_plan_takes_the_estimated_bytes(
    tiny_llama: TinyLlamaFactory,
    quantizer: QuantizerSettings,
    bits: tuple[int, ...],
    tied: bool,
    optimizer_name: str,
) -> None:
    base = tiny_llama(tie_word_embeddings=tied, attention_bias=True)
    memory_model = MemoryModel.from_model(base, optimizer=optimizer_name)
    plan = BitRankPlan(mixed_layers(list(memory_model.modules), bits), quantizer=quantizer)
    model = get_peft_model(base, AutoQRAConfig(plan=plan))
    optimizer = make_optimizer(optimizer_name, model)
    train_one_step(model, optimizer)
    estimate = memory_model.estimate(plan)
    assert measure_memory(model, plan, optimizer) == estimate
    assert estimate.optimizer_bytes == 0 if optimizer_name == "sgd" else estimate.optimizer_bytes > 0


def test_a_plan_for_some_modules_leaves_the_others_dense(tiny_llama: TinyLlamaFactory) -> None:
    base = tiny_llama()
    memory_model = MemoryModel.from_model(base)
    plan = BitRankPlan(mixed_layers(list(memory_model.modules)[:4]), quantizer=NATIVE)
    model = get_peft_model(base, AutoQRAConfig(plan=plan))
    expected = memory_model.estimate(plan)
    measured = measure_memory(model, memory_model.modules)
    assert measured.frozen_bytes == expected.frozen_bytes
    assert measured.stored_bytes == expected.stored_bytes


def test_a_tied_output_layer_cannot_be_planned(tiny_llama: TinyLlamaFactory) -> None:
    with pytest.raises(InvalidPlanError, match=r"'lm_head' .* tied"):
        MemoryModel.from_model(tiny_llama(tie_word_embeddings=True), target_modules=["lm_head"])
    untied = MemoryModel.from_model(tiny_llama(tie_word_embeddings=False), target_modules=["lm_head"])
    assert list(untied.modules) == ["lm_head"]


def test_the_untouched_base_is_the_bytes_of_its_tensors(tiny_llama: TinyLlamaFactory) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in (*base.parameters(), *base.buffers())}
    assert MemoryModel.from_model(base).estimate({}).total_bytes == sum(unique.values())


def test_a_model_on_the_meta_device_gives_the_same_estimate(tiny_llama: TinyLlamaFactory) -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_llama().config)
    assert MemoryModel.from_model(base) == MemoryModel.from_model(tiny_llama())


def test_parts_and_scopes_add_up() -> None:
    estimate = MemoryEstimate(
        weight_bytes=1,
        metadata_bytes=20,
        untouched_bytes=300,
        adapter_bytes=4000,
        gradient_bytes=50000,
        optimizer_bytes=600000,
    )
    assert estimate.frozen_bytes == 321
    assert estimate.stored_bytes == estimate.in_scope("stored") == 4321
    assert estimate.total_bytes == estimate.in_scope("training") == 654321
    assert MemoryEstimate(**estimate.to_dict()) == estimate


def test_closed_form_of_one_layer() -> None:
    memory_model = MemoryModel({"layer": ModuleShape(48, 64, 2)}, 7, adapter_itemsize=2)
    estimate = memory_model.estimate({"layer": LayerPlan(3, 5)}, NATIVE)
    groups, parameters = 48 * 64 // 32, 5 * (48 + 64)
    assert estimate == MemoryEstimate(
        weight_bytes=48 * 64 * 3 // 8,
        metadata_bytes=2 * groups + 8,
        untouched_bytes=7,
        adapter_bytes=2 * parameters,
        gradient_bytes=2 * parameters,
        optimizer_bytes=8 * parameters + 8,
    )
    assert memory_model.estimate({"layer": LayerPlan(16, 0)}).weight_bytes == 48 * 64 * 2


def test_the_plans_own_quantizer_is_the_default() -> None:
    memory_model = MemoryModel({"layer": ModuleShape(64, 64, 4)}, 0)
    plan = BitRankPlan({"layer": LayerPlan(4, 0)}, quantizer=BNB)
    assert memory_model.estimate(plan) == memory_model.estimate(dict(plan), BNB)
    assert memory_model.estimate(plan, NATIVE) != memory_model.estimate(plan)


def test_uniform_caps_the_rank_at_each_weights_smaller_side() -> None:
    memory_model = MemoryModel({"a": ModuleShape(8, 64, 4), "b": ModuleShape(64, 64, 4)}, 0)
    assert memory_model.uniform(4, 16) == {"a": LayerPlan(4, 8), "b": LayerPlan(4, 16)}


def test_names_that_the_model_does_not_have() -> None:
    with pytest.raises(PlanMismatchError, match=r"\['other'\].*no targeted linear layers"):
        MemoryModel({"layer": ModuleShape(8, 64, 4)}, 0).estimate({"other": LayerPlan(4, 0)})


def test_bits_that_the_backend_does_not_have() -> None:
    with pytest.raises(InvalidPlanError, match=r"bits=3 of 'layer'.*4 bits"):
        MemoryModel({"layer": ModuleShape(8, 64, 4)}, 0).estimate({"layer": LayerPlan(3, 0)}, BNB)


def test_an_optimizer_of_unknown_size() -> None:
    with pytest.raises(InvalidPlanError, match=r"'adafactor' is not known; use one of \('adamw_torch'"):
        MemoryModel({}, 0, "adafactor")


def test_target_modules_choose_what_may_be_planned(tiny_llama: TinyLlamaFactory) -> None:
    assert len(MemoryModel.from_model(tiny_llama(), target_modules=["q_proj", "v_proj"]).modules) == 4
    assert len(MemoryModel.from_model(tiny_llama(), target_modules=r".*\.0\.mlp\..*_proj").modules) == 3
    assert not any("lm_head" in name for name in MemoryModel.from_model(tiny_llama()).modules)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [(["q_projj"], r"\['q_projj'\] matches no linear layer; there are"), (["norm"], "'model.norm' is a LlamaRMSNorm")],
)
def test_target_modules_that_cannot_be_planned(
    tiny_llama: TinyLlamaFactory, target_modules: list[str], message: str
) -> None:
    with pytest.raises(InvalidPlanError, match=message):
        MemoryModel.from_model(tiny_llama(), target_modules=target_modules)


def test_a_quantized_model_cannot_be_planned_again(tiny_llama: TinyLlamaFactory) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=4, r=4)).unload()
    with pytest.raises(InvalidPlanError, match=r"QuantLinear.*without quantization"):
        MemoryModel.from_model(model, target_modules=["q_proj"])


# --------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("granularity", ["module", "fused", "layer"])
@pytest.mark.parametrize("scope", ["training", "stored"])
def test_the_table_adds_up_to_the_estimate(
    tiny_llama: TinyLlamaFactory, scope: MemoryScope, granularity: Granularity
) -> None:
    memory_model = MemoryModel.from_model(tiny_llama())
    space = build_search_space(memory_model.modules, granularity, (2, 3, 4, 8, 16), (0, 4, 8))
    table = memory_model.bytes_table(space, NATIVE, scope)

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        candidate = space.sample(np.random.default_rng(seed))
        summed = sum(int(table[group, bit, rank]) for group, (bit, rank) in enumerate(candidate))
        estimate = memory_model.estimate(space.decode(candidate), NATIVE)
        assert summed + memory_model.untouched_bytes == estimate.in_scope(scope)

    check()
    assert (np.diff(table, axis=1) > 0).all()
    assert (np.diff(table, axis=2) > 0).all()


def make_problem(memory_model: MemoryModel, budget_bytes: int) -> SearchProblem:
    space = build_search_space(memory_model.modules, "layer", (2, 4, 16), (0, 4, 8))
    table = memory_model.bytes_table(space, NATIVE, "training")
    return SearchProblem(space, table, np.zeros(table.shape), memory_model.untouched_bytes, budget_bytes)


def test_a_budget_below_the_smallest_plan_names_the_smallest(tiny_llama: TinyLlamaFactory) -> None:
    memory_model = MemoryModel.from_model(tiny_llama())
    smallest = memory_model.estimate(memory_model.uniform(2, 0), NATIVE).total_bytes
    assert make_problem(memory_model, smallest).smallest_bytes == smallest
    with pytest.raises(MemoryBudgetError, match=f"budget of {smallest - 1:,} bytes.*takes {smallest:,} bytes.*Raise"):
        make_problem(memory_model, smallest - 1)


def test_a_problem_knows_the_bytes_and_feasibility_of_its_candidates(tiny_llama: TinyLlamaFactory) -> None:
    memory_model = MemoryModel.from_model(tiny_llama())
    limit = memory_model.estimate(memory_model.uniform(4, 4), NATIVE).total_bytes
    problem = make_problem(memory_model, limit)
    assert problem.total_bytes(problem.space.uniform(4, 4)) == limit
    assert problem.is_feasible(problem.space.uniform(4, 4))
    assert not problem.is_feasible(problem.space.uniform(4, 8))
    assert not problem.is_feasible(((9, 9),) * problem.space.num_groups)
    assert problem.smallest_candidate() == problem.space.uniform(2, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tables_that_are_not_finite_are_refused(tiny_llama: TinyLlamaFactory, value: float) -> None:
    problem = make_problem(MemoryModel.from_model(tiny_llama()), 10**9)
    losses = problem.loss_table.copy()
    losses[0, 0, 0] = value
    with pytest.raises(ValueError, match="loss_table holds values that are not finite"):
        SearchProblem(problem.space, problem.bytes_table, losses, 0, 10**9)
    with pytest.raises(ValueError, match="loss_table has shape"):
        SearchProblem(problem.space, problem.bytes_table, losses[:1], 0, 10**9)


# ------------------------------------------------------------------------------------------------------------ budgets

SMALL = MemoryModel({"a": ModuleShape(64, 64, 2), "b": ModuleShape(32, 64, 2)}, 1000)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (123456, 123456),
        ("0123456", 123456),
        ("6GB", 6 * 10**9),
        ("6 gb", 6 * 10**9),
        ("1.5MB", 1_500_000),
        ("2kB", 2000),
        ("3TB", 3 * 10**12),
        ("100B", 100),
        ("6GiB", 6 * 2**30),
        ("1 MiB", 2**20),
        ("1KiB", 2**10),
        ("2TiB", 2**41),
        ("0.5*6GB", 3 * 10**9),
        ("0.5 * 1000", 500),
        (" 6GB ", 6 * 10**9),
    ],
)
def test_budgets_in_bytes(text: int | str, num_bytes: int) -> None:
    assert resolve_budget(text, SMALL) == MemoryBudget(num_bytes, "training")
    assert resolve_budget(text, SMALL, "stored") == MemoryBudget(num_bytes, "stored")


@pytest.mark.parametrize("scope", ["training", "stored"])
def test_the_budget_of_qlora_is_what_it_takes(scope: MemoryScope) -> None:
    expected = SMALL.estimate(SMALL.uniform(4, 16), BNB).in_scope(scope)
    assert resolve_budget("qlora-4bit-r16", SMALL, scope) == MemoryBudget(expected, scope)
    assert resolve_budget("0.75*qlora-4bit-r16", SMALL, scope).limit_bytes == int(expected * 0.75)
    assert resolve_budget("QLoRA-4bit-r16", SMALL, scope).limit_bytes == expected


def test_a_budget_in_bits_per_weight_counts_what_is_stored() -> None:
    expected = MemoryBudget(1000 + int(3.2 * (64 * 64 + 32 * 64) / 8), "stored")
    assert resolve_budget("3.2bit", SMALL) == resolve_budget("3.2 bits", SMALL, "stored") == expected
    with pytest.raises(MemoryBudgetError, match=r"'3\.2bit' counts what is stored"):
        resolve_budget("3.2bit", SMALL, "training")


@pytest.mark.parametrize(
    "text", ["", "lots", "6 XB", "GB", "-6GB", "6GB extra", "qlora-3bit-r16", "qlora", "6ib", "1e9"]
)
def test_budgets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(MemoryBudgetError, match=r"cannot be read; write bytes, '6GB', '3\.2bit' or") as error:
        resolve_budget(text, SMALL)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["0.0", 0, "0GB", "1.2.3GB", ".", "0*6GB", "0bit", "1..2*6GB"])
def test_budgets_that_are_no_positive_number(text: int | str) -> None:
    with pytest.raises(MemoryBudgetError, match="not a positive number"):
        resolve_budget(text, SMALL)


@pytest.mark.parametrize("budget", [None, True, 6e9, -5, [6]])
def test_budgets_of_another_type(budget: Any) -> None:
    with pytest.raises(MemoryBudgetError) as error:
        resolve_budget(budget, SMALL)
    assert repr(budget) in str(error.value)
    assert isinstance(error.value, AutoQRAError)
    assert isinstance(error.value, ValueError)
