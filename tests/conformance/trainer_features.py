"""Training with the trainers of transformers and TRL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_autoqra.plan import BitRankPlan
from tests.conformance.building import adapt, make_config, outputs, planned, quantized_layers
from tests.conformance.feature import CAUSAL, FeatureGroup, Refusal
from tests.conformance.models import ModelCase
from tests.tiny_data import token_dataset, word_tokenizer
from tests.tuner.synthetic import random_calibration

GROUP = FeatureGroup("Trainers")
feature = GROUP.feature
NO_CAUSAL_MODEL = "TRL's trainer is for causal language models."
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "seed": 0,
    "gradient_checkpointing": False,
}


def rows(case: ModelCase) -> list[dict[str, torch.Tensor]]:
    """The case's batch four times over, row by row."""
    batch = case.batch()
    if "labels" in batch and "decoder_input_ids" in batch:
        del batch["decoder_input_ids"]
    return [{name: tensor[i] for name, tensor in batch.items()} for _ in range(4) for i in range(2)]


def make_trainer(case: ModelCase, folder: Path, model: nn.Module | None = None, **settings: Any) -> Trainer:
    if model is None:
        model = adapt(case, plan=planned(case, case.make()))
    arguments = TrainingArguments(output_dir=str(folder), **(SETTINGS | settings))
    return Trainer(model=model, args=arguments, train_dataset=rows(case), eval_dataset=rows(case)[:2])


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def margins(trainer: DPOTrainer) -> list[float]:
    """By how much the policy's preference exceeds the reference's, step by step."""
    return [float(entry["rewards/margins"]) for entry in trainer.state.log_history if "rewards/margins" in entry]


@feature("`Trainer`: a run resumed from a checkpoint ends as one that was not interrupted")
def resume(case: ModelCase, tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(case, tmp_path, **settings)
    straight.train()
    resumed = make_trainer(case, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert torch.equal(outputs(case, resumed.model), outputs(case, straight.model))


@feature("`Trainer`: the best checkpoint is loaded at the end")
def best_model(case: ModelCase, tmp_path: Path) -> None:
    """The learning rate is so high that the first checkpoint is the best."""
    trainer = make_trainer(
        case, tmp_path, learning_rate=10.0, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    again = PeftModel.from_pretrained(case.make(), best)
    assert torch.equal(outputs(case, trainer.model), outputs(case, again))


def losses_with(case: ModelCase, folder: Path, *, reentrant: bool | None) -> list[float]:
    settings: dict[str, Any] = {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    torch.manual_seed(0)
    trainer = make_trainer(case, folder, **settings)
    trainer.train()
    return losses(trainer)


@feature("`Trainer`: the same losses with gradient checkpointing")
def checkpointed_training(case: ModelCase, tmp_path: Path) -> None:
    plain, checkpointed = (losses_with(case, tmp_path, reentrant=reentrant) for reentrant in (None, False))
    assert len(plain) == 2
    assert checkpointed == plain


@feature("the same with `use_reentrant=True`", refused={"ViT": Refusal(
    error=UserWarning,
    match="None of the inputs have requires_grad=True",
    reason="torch warns that there are no gradients: reentrant checkpointing needs inputs that have one, and images "
    "have none. Use `use_reentrant=False`, the default.",
)})  # fmt: skip
def reentrant_training(case: ModelCase, tmp_path: Path) -> None:
    plain, checkpointed = (losses_with(case, tmp_path, reentrant=reentrant) for reentrant in (None, True))
    assert checkpointed == pytest.approx(plain, rel=1e-6)  # gradients may be summed in another order


@feature("`Trainer(bf16=True)` and `Trainer(fp16=True)`: autocast")
def autocast(case: ModelCase, tmp_path: Path) -> None:
    for precision in ("bf16", "fp16"):
        trainer = make_trainer(case, tmp_path, **{"bf16": False, precision: True})
        codes = [tensor.clone() for layer in quantized_layers(trainer.model) for tensor in layer.parameters()]
        trainer.train()
        assert all(math.isfinite(value) for value in losses(trainer))
        after = [tensor for layer in quantized_layers(trainer.model) for tensor in layer.parameters()]
        assert all(torch.equal(old, new) for old, new in zip(codes, after, strict=True))


def sft(case: ModelCase, folder: Path, **settings: Any) -> SFTTrainer:
    return SFTTrainer(
        model=case.make(),
        args=SFTConfig(output_dir=str(folder), **(SETTINGS | settings)),
        train_dataset=token_dataset(0),
        processing_class=word_tokenizer(),
        peft_config=make_config(case, plan=planned(case, case.make())),
    )


@feature("`SFTTrainer(peft_config=AutoQRAConfig(...))`", only_for=CAUSAL, otherwise=NO_CAUSAL_MODEL)
def supervised(case: ModelCase, tmp_path: Path) -> None:
    trainer = sft(case, tmp_path, save_strategy="steps", save_steps=2)
    assert quantized_layers(trainer.model)
    trainer.train()
    again = PeftModel.from_pretrained(case.make(), tmp_path / "checkpoint-2")
    assert torch.equal(outputs(case, again), outputs(case, trainer.model))


@feature("`SFTTrainer` with packing", only_for=CAUSAL, otherwise=NO_CAUSAL_MODEL)
def packed(case: ModelCase, tmp_path: Path) -> None:
    trainer = sft(case, tmp_path, packing=True, packing_strategy="wrapped", max_length=16)
    trainer.train()
    assert all(math.isfinite(value) for value in losses(trainer))


def preferences() -> Dataset:
    row = {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w9 w8"}
    return Dataset.from_list([row] * 8)


def dpo(model: nn.Module, folder: Path, **arguments: Any) -> DPOTrainer:
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), **(SETTINGS | {"max_length": 16, "learning_rate": 2e-3})),
        train_dataset=preferences(),
        processing_class=word_tokenizer(),
        **arguments,
    )


def compensated_plan(case: ModelCase) -> BitRankPlan:
    plan = planned(case, case.make(), initialization="compensate")
    return plan.replace(calibration=random_calibration(case.make(), plan))


@feature(
    "`DPOTrainer(peft_config=...)`: the reference is the disabled adapter",
    only_for=CAUSAL,
    otherwise=NO_CAUSAL_MODEL,
)
def preference_with_config(case: ModelCase, tmp_path: Path) -> None:
    trainer = dpo(case.make(), tmp_path, peft_config=make_config(case, plan=planned(case, case.make())))
    trainer.train()
    assert margins(trainer)[0] == pytest.approx(0, abs=1e-5)
    assert margins(trainer)[1] > 1e-3


@feature(
    "`DPOTrainer(model=get_peft_model(...))`: the reference is the adapter as it started, compensated or not",
    only_for=CAUSAL,
    otherwise=NO_CAUSAL_MODEL,
)
def preference_with_adapter(case: ModelCase, tmp_path: Path) -> None:
    trainer = dpo(adapt(case, plan=compensated_plan(case)), tmp_path)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    trainer.train()
    assert margins(trainer)[0] == pytest.approx(0, abs=1e-5)
    assert margins(trainer)[1] > 1e-3


@feature("`GRPOTrainer`", only_for=CAUSAL, otherwise=NO_CAUSAL_MODEL)
def policy_gradient(case: ModelCase, tmp_path: Path) -> None:
    trainer = GRPOTrainer(
        model=case.make(),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(
            output_dir=str(tmp_path), num_generations=2, max_completion_length=4, beta=0.1, temperature=1.0,
            **(SETTINGS | {"max_steps": 1}),
        ),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2 w3"}] * 4),
        processing_class=word_tokenizer(),
        peft_config=make_config(case, plan=planned(case, case.make())),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1
    assert quantized_layers(trainer.model)
