"""A base that was quantized while it was read trains as one that was quantized in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig
from tests.conftest import TinyLlamaFactory
from tests.streaming.bases import adapt, load_dense, load_streaming, save_base
from tests.tuner.synthetic import calibrated_plan
from tests.tuner.test_trainers import make_trainer


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT and transformers
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trainer(tiny_llama: TinyLlamaFactory, tmp_path: Path, gradient_checkpointing: bool) -> None:
    folder = save_base(tiny_llama, tmp_path)
    plan = calibrated_plan(load_dense(folder))

    def train(base: nn.Module) -> list[float]:
        config = AutoQRAConfig(plan=plan)
        trainer = make_trainer(base, tmp_path, config, gradient_checkpointing=gradient_checkpointing)
        return losses(trainer)

    expected = train(load_dense(folder))
    assert len(expected) == 2
    assert train(load_streaming(folder, AutoQRAQuantConfig(plan=plan))) == expected


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_gradient_checkpointing_of_the_trainer(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, reentrant: bool | None
) -> None:
    settings: dict[str, Any] = {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, learning_rate=1e-2, report_to="none", disable_tqdm=True,
        logging_steps=1, **settings,
    )  # fmt: skip
    folder = save_base(tiny_llama, tmp_path)
    data = [{"input_ids": [1, 5, 9, 3], "labels": [1, 5, 9, 3]}] * 4

    def train(base: nn.Module) -> list[float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return losses(Trainer(model=adapt(base, bits=3, r=4), args=args, train_dataset=data))

    expected = train(load_dense(folder))
    assert expected[0] != expected[1]
    assert train(load_streaming(folder, AutoQRAQuantConfig(bits=3))) == expected
