"""Bytes of a fine-tune in the logs of plain transformers and TRL trainers."""

from __future__ import annotations

import warnings

import pytest
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from peft_autoqra import AutoQRAConfig, MemoryBudgetCallback, MemoryModel, uniform_plan
from peft_autoqra.errors import InvalidPlanError, MemoryBudgetError
from peft_autoqra.memory import MemoryBudget
from peft_autoqra.memory_callback import MemoryBudgetWarning

DATA = [{"input_ids": [1, 5, 9, 3], "labels": [1, 5, 9, 3]}] * 4


@pytest.fixture
def make_trainer(tiny_llama, tmp_path):
    def make(plan=None, **settings) -> Trainer:
        base = tiny_llama()
        plan = uniform_plan(base, 4, 4) if plan is None else plan
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path), "use_cpu": True, "max_steps": 3, "report_to": "none",
                "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
            }
            | settings
        )  # fmt: skip
        return Trainer(model=get_peft_model(base, AutoQRAConfig(plan=plan)), args=args, train_dataset=DATA)

    return make


@pytest.fixture
def estimate(tiny_llama):
    base = tiny_llama()
    return MemoryModel.from_model(base).estimate(uniform_plan(base, 4, 4))


def memory_logs(trainer: Trainer) -> list[dict[str, int]]:
    entries = [{k: v for k, v in entry.items() if k.startswith("memory/")} for entry in trainer.state.log_history]
    return [entry for entry in entries if entry]


@pytest.mark.parametrize("max_steps", [1, 3])
def test_the_estimated_bytes_are_logged_once(make_trainer, estimate, max_steps):
    trainer = make_trainer(max_steps=max_steps)
    callback = MemoryBudgetCallback(trainer, budget=estimate.total_bytes)
    trainer.add_callback(callback)
    assert callback.measured is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryBudgetWarning)
        trainer.train()
    assert callback.measured == estimate
    totals = {"total_bytes": estimate.total_bytes, "budget_bytes": estimate.total_bytes}
    assert memory_logs(trainer) == [{f"memory/{key}": value for key, value in (estimate.to_dict() | totals).items()}]
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == max_steps  # none is lost


def test_trackers_get_the_figures(make_trainer, tmp_path):
    trainer = make_trainer(report_to="tensorboard")
    trainer.add_callback(MemoryBudgetCallback(trainer))
    trainer.train()
    (file,) = tmp_path.rglob("events.out.*")
    scalars = EventAccumulator(str(file)).Reload()
    (event,) = scalars.Scalars("train/memory/total_bytes")
    assert event.value == memory_logs(trainer)[0]["memory/total_bytes"]


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_more_than_the_budget_is_warned_of_once(make_trainer, estimate, gradient_accumulation_steps):
    trainer = make_trainer(gradient_accumulation_steps=gradient_accumulation_steps)
    trainer.add_callback(MemoryBudgetCallback(trainer, budget=estimate.total_bytes - 1000))
    with pytest.warns(
        MemoryBudgetWarning, match=r"gradients .* optimizer .*1\.0 kB more than.*memory_budget"
    ) as caught:
        trainer.train()
    assert len([w for w in caught if w.category is MemoryBudgetWarning]) == 1


def test_the_searched_budget_is_the_default_in_its_scope(make_trainer, tiny_llama, estimate):
    searched = {"budget_bytes": estimate.stored_bytes, "budget_scope": "stored"}
    plan = uniform_plan(tiny_llama(), 4, 4).replace(provenance=searched)
    trainer = make_trainer(plan)
    trainer.add_callback(MemoryBudgetCallback(trainer))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryBudgetWarning)
        trainer.train()
    assert memory_logs(trainer)[0]["memory/budget_bytes"] == estimate.stored_bytes

    trainer = make_trainer(plan.replace(provenance={**searched, "budget_bytes": estimate.stored_bytes - 1}))
    trainer.add_callback(MemoryBudgetCallback(trainer))
    with pytest.warns(MemoryBudgetWarning, match="1 B more"):
        trainer.train()


@pytest.mark.parametrize("provenance", [{}, {"budget_bytes": "many", "budget_scope": "training"}])
def test_without_a_budget_the_bytes_are_logged_alone(make_trainer, tiny_llama, provenance):
    trainer = make_trainer(uniform_plan(tiny_llama(), 4, 4).replace(provenance=provenance))
    trainer.add_callback(MemoryBudgetCallback(trainer))
    trainer.train()
    assert "memory/budget_bytes" not in memory_logs(trainer)[0]


def test_what_cannot_be_counted_is_refused(make_trainer, tiny_llama, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(InvalidPlanError, match="no AutoQRA adapter"):
        MemoryBudgetCallback(Trainer(model=tiny_llama(), args=args))
    with pytest.raises(MemoryBudgetError, match="budget=0"):
        MemoryBudgetCallback(make_trainer(), budget=0)
    with pytest.raises(MemoryBudgetError, match="budget=-3"):
        MemoryBudgetCallback(make_trainer(), budget=MemoryBudget(-3, "training"))
    with pytest.raises(MemoryBudgetError, match=r"'6GB' must be bytes.*resolve_budget"):
        MemoryBudgetCallback(make_trainer(), budget="6GB")


def test_bits_do_in_place_of_a_plan(tiny_llama, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True)
    base = tiny_llama()
    estimate = MemoryModel.from_model(base).estimate(uniform_plan(base, 3, 8))
    model = get_peft_model(base, AutoQRAConfig(bits=3, r=8))
    trainer = Trainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA)
    callback = MemoryBudgetCallback(trainer)
    trainer.add_callback(callback)
    trainer.evaluate()
    assert callback.measured is None  # nothing is held before the first step
    trainer.train()
    assert callback.measured == estimate


def test_an_optimizer_with_other_states_is_measured(make_trainer, estimate):
    trainer = make_trainer(optim="sgd")
    callback = MemoryBudgetCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.measured.optimizer_bytes == 0
    assert callback.measured.adapter_bytes == estimate.adapter_bytes
