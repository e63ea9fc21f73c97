"""Shared adapters: what plans score with them, against hand-made models, and that they leave nothing behind."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from trl import SFTConfig

from peft_autoqra import BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.evaluation.held_out import held_out_loss
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.evaluation.sft import SFTData, SFTEvaluator, left_as_it_was
from peft_autoqra.evaluation.supernet import Supernet
from peft_autoqra.importance.calibration_bank import BankSettings, CalibrationBank, build_calibration_bank
from peft_autoqra.importance.module_fit import FitSettings
from peft_autoqra.target_modules import linear_targets
from peft_autoqra.trial import Fidelity, TrialStatus
from tests.tiny_data import token_dataset, word_tokenizer

QUANTIZER = QuantizerSettings(group_size=32)
MAX_RANK, LORA_ALPHA = 4, 8
SHARED = Fidelity(num_steps=0, num_eval_sequences=8, shared_steps=4)


@pytest.fixture(scope="module")
def bank(tiny_llama) -> CalibrationBank:
    model = tiny_llama()
    batches = [{"input_ids": torch.tensor(token_dataset(seed=0, num_sequences=4)["input_ids"])}]
    names = tuple(linear_targets(model))
    fit = FitSettings(max_rank=MAX_RANK)
    settings = BankSettings(module_names=names, bit_choices=(2, 4), quantizer=QUANTIZER, fit=fit)
    return build_calibration_bank(model, batches, settings)


def make_plan(bank, shift: int = 0, **changes) -> BitRankPlan:
    """Every bit-width with every rank, 16 bits and rank 0 among them."""
    bits, ranks = (2, 4, 16), (4, 0, 1, 2)
    names = bank.settings.module_names
    layers = {n: LayerPlan(bits[(i + shift) % 3], ranks[(i + 2 * shift) % 4]) for i, n in enumerate(names)}
    return BitRankPlan(layers, **{"quantizer": QUANTIZER, "initialization": "compensate"} | changes)


@dataclass
class World:
    """A resident model with what evaluates plans on it."""

    model: torch.nn.Module
    resident: ResidentModel
    data: SFTData
    bank: CalibrationBank
    args: SFTConfig
    evaluator: SFTEvaluator

    def loss(self, plan, fidelity) -> float:
        result = self.evaluator.evaluate(plan, fidelity)
        assert result.status is TrialStatus.COMPLETED, result.error
        return result.loss


@pytest.fixture
def make_world(tiny_llama, bank, tmp_path):
    def make(shared_plans=None, **changes) -> World:
        settings = {
            "output_dir": str(tmp_path),
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "max_length": 16,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "use_cpu": True,
        }
        args, model = SFTConfig(**settings | changes), tiny_llama()
        data = SFTData(model, args, token_dataset(seed=0), token_dataset(seed=0), word_tokenizer())
        resident = ResidentModel(model, linear_targets(model), bank)
        plans = [make_plan(bank, shift) for shift in range(3)] if shared_plans is None else shared_plans
        return World(model, resident, data, bank, args, SFTEvaluator(resident, data, bank, args, LORA_ALPHA, plans))

    return make


class StepsWithoutOptimizer:
    """In the place of the trainer: steps whose logits and gradients are kept."""

    def __init__(self, inputs, num_steps: int) -> None:
        self.inputs, self.num_steps, self.logits, self.gradients = inputs, num_steps, [], []

    def __call__(self, model, callback) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # so that something is computed
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
        for _ in range(self.num_steps):
            callback.on_step_begin()
            logits = model(self.inputs).logits
            logits.square().mean().backward()
            trained = {n: torch.zeros(p.shape) if p.grad is None else p.grad for n, p in model.named_parameters()}
            model.zero_grad()
            self.logits.append(logits.detach())
            self.gradients.append(trained)


@pytest.fixture
def shared_run(make_world, bank):
    """Three plans in training, without an optimizer; the adapter, what was seen, and the world."""
    world = make_world()
    plans = [make_plan(bank, shift) for shift in range(3)]
    run = StepsWithoutOptimizer(torch.arange(24).view(2, 12), num_steps=3)
    with left_as_it_was(world.model):
        supernet = Supernet(world.resident, plans, LORA_ALPHA, MAX_RANK)
        adapter = supernet.train(run, seed=5)
    order = [plans[i] for i in np.random.default_rng(5).permutation(3)]
    return world, run, adapter, order


def by_hand(model, bank, plan, adapter) -> torch.nn.Module:
    """Decoded weight, plus correction, plus shared part, written out."""
    for name, layer in linear_targets(model).items():
        bits, rank = plan[name].bits, plan[name].rank
        weight = layer.weight.detach().clone()
        if bits != 16:
            entry = bank.entry(name, bits)
            weight = entry.weight.dequantize(torch.float32)
            if plan.initialization == "compensate":
                left, right = (torch.from_numpy(s).float() for s in (entry.correction.left, entry.correction.right))
                weight = weight + left[:, :rank] @ right[:rank]
        lora_b, lora_a = adapter.factors[name]
        for r in range(rank):
            weight = weight + LORA_ALPHA * 4 / rank * torch.outer(lora_b[:, r], lora_a[r])
        layer.weight.data = weight
    return model


def test_a_plan_scores_as_a_model_made_by_hand(make_world, bank, tiny_llama):
    world = make_world()
    for plan in (make_plan(bank), make_plan(bank, 1), make_plan(bank, initialization="zero")):
        loss = world.loss(plan, SHARED)
        (adapter,) = world.evaluator._shared.values()
        model = by_hand(tiny_llama(), bank, plan, adapter)
        expected = held_out_loss(model, world.data.batches(world.data.held_out, 8)).mean
        assert loss == pytest.approx(expected, abs=1e-5)
        assert abs(loss - world.loss(plan, replace(SHARED, shared_steps=0))) > 1e-3


def test_training_sees_the_models_that_are_scored(shared_run, bank, tiny_llama):
    _, run, adapter, order = shared_run
    for plan, logits in zip(order, run.logits, strict=True):
        model = by_hand(tiny_llama(), bank, plan, adapter)
        torch.testing.assert_close(logits, model(run.inputs).logits, atol=1e-4, rtol=1e-4)


def test_a_step_trains_the_first_components_of_a_plan(shared_run):
    _, run, _, order = shared_run
    for plan, gradients in zip(order, run.gradients, strict=True):
        for name, layer in plan.items():
            lora_a, lora_b = (gradients[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
            assert [bool(row.any()) for row in lora_a] == [r < layer.rank for r in range(MAX_RANK)], name
            assert [bool(column.any()) for column in lora_b.T] == [r < layer.rank for r in range(MAX_RANK)], name


def test_training_helps_plans_it_saw_and_one_it_did_not(make_world, bank):
    world = make_world()
    for shift in range(4):
        plan = make_plan(bank, shift)
        shared = world.loss(plan, replace(SHARED, shared_steps=24))
        assert shared < world.loss(plan, replace(SHARED, shared_steps=0)) - 0.02


def test_a_plan_without_adapters_borrows_nothing(make_world, bank):
    world = make_world()
    bare = BitRankPlan({n: LayerPlan(2, 0) for n in bank.settings.module_names}, quantizer=QUANTIZER)
    world.loss(make_plan(bank), SHARED)
    assert world.loss(bare, SHARED) == world.loss(bare, replace(SHARED, shared_steps=0))


def test_scores_are_the_same_after_a_kill_and_in_another_order(make_world, bank):
    """A search that goes on trains the supernet again, at another trial; others do not notice."""
    plans, own = [make_plan(bank, shift) for shift in range(3)], Fidelity(num_steps=1, num_eval_sequences=8)
    first, second = make_world(), make_world()
    scores = [first.loss(plan, SHARED) for plan in plans]
    trained = first.loss(plans[0], own)
    assert second.loss(plans[0], own) == trained  # the supernet of the other world changed nothing
    torch.rand(3)
    assert [second.loss(plan, SHARED) for plan in reversed(plans)] == scores[::-1]
    assert second.loss(plans[0], own) == trained
    assert [first.loss(plan, SHARED) for plan in plans] == scores


def test_other_seeds_and_steps_are_other_supernets(make_world, bank):
    world, plan = make_world(), make_plan(bank)
    fidelities = [SHARED, replace(SHARED, seed=1), replace(SHARED, shared_steps=3)]
    assert len({world.loss(plan, fidelity) for fidelity in fidelities}) == 3


def test_the_first_trial_tells_what_training_cost(make_world, bank):
    world = make_world()
    results = [world.evaluator.evaluate(make_plan(bank), f) for f in (SHARED, replace(SHARED, num_eval_sequences=4))]
    assert 0 < results[0].metrics["supernet_seconds"] < results[0].seconds
    assert results[1].metrics == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind(make_world, bank, checkpointing):
    world = make_world(gradient_checkpointing=checkpointing)

    def state():
        return (
            [(n, type(m), m.training, list(m._forward_hooks)) for n, m in world.model.named_modules()],
            [(n, p.requires_grad, p.tolist()) for n, p in world.model.named_parameters()],
            (
                world.model.is_activation_checkpointing,
                world.model.config.use_cache,
                hasattr(world.model, "peft_config"),
            ),
            (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
        )

    world.loss(make_plan(bank), replace(SHARED, shared_steps=0))  # loads the held-out data
    world.resident.restore()
    before = state()
    world.loss(make_plan(bank), SHARED)
    world.resident.restore()
    for now, then in zip(state(), before, strict=True):
        assert (now == then) is True


def test_without_plans_the_remedy_is_named(make_world, bank):
    bare = BitRankPlan({n: LayerPlan(2, 0) for n in bank.settings.module_names}, quantizer=QUANTIZER)
    for plans in ([], [bare]):
        result = make_world(plans).evaluator.evaluate(make_plan(bank), SHARED)
        assert result.status is TrialStatus.FAILED
        assert f"given {len(plans)} plans with an adapter in none" in result.error
        assert "shared_plans" in result.error


def test_own_steps_and_borrowed_ones_are_not_mixed(make_world, bank):
    result = make_world().evaluator.evaluate(make_plan(bank), replace(SHARED, num_steps=2))
    assert "set num_steps or shared_steps to 0" in result.error


def test_a_rank_above_the_supernets_is_refused(shared_run):
    *_, adapter, _ = shared_run
    with pytest.raises(InvalidPlanError, match=r"Rank 5 of .* is above the supernet's 4"):
        adapter.cut(next(iter(adapter.factors)), 5)
