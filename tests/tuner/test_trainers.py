"""SFTTrainer with our configuration: two steps, a checkpoint, and going on from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_autoqra.quant.backends import QUANTIZED_LAYERS
from peft_autoqra.tuner.config import AutoQRAConfig
from tests.conftest import TinyLlamaFactory
from tests.tiny_data import token_dataset, word_tokenizer
from tests.tuner.synthetic import TOKENS, calibrated_plan, logits, mixed_plan


def make_trainer(model: Any, output_dir: Path, peft_config: AutoQRAConfig | None, **settings: Any) -> SFTTrainer:
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output_dir), **(arguments | settings)),
        train_dataset=token_dataset(0),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


def frozen_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT and transformers
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trainer_takes_the_configuration(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, gradient_checkpointing: bool
) -> None:
    plan = calibrated_plan(tiny_llama())
    trainer = make_trainer(
        tiny_llama(), tmp_path, AutoQRAConfig(plan=plan), gradient_checkpointing=gradient_checkpointing
    )
    assert isinstance(trainer.model, PeftModel)
    assert any(isinstance(module, QUANTIZED_LAYERS) for module in trainer.model.modules())
    before, adapters = frozen_tensors(trainer.model), [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    after = frozen_tensors(trainer.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), adapters, strict=True)]
    assert moved == [p.requires_grad for p in trainer.model.parameters()]


def test_checkpointed_gradients_train_the_same(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        config = AutoQRAConfig(plan=calibrated_plan(tiny_llama()))
        trainer = make_trainer(tiny_llama(), tmp_path, config, gradient_checkpointing=checkpointing)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_a_wrapped_model_trains_as_well(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=3, r=4))
    make_trainer(model, tmp_path, None).train()
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_training_goes_on_from_a_checkpoint(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    def trainer(folder: str, **settings: Any) -> SFTTrainer:
        config = AutoQRAConfig(plan=calibrated_plan(tiny_llama()))
        return make_trainer(tiny_llama(), tmp_path / folder, config, save_strategy="steps", save_steps=2, **settings)

    straight = trainer("straight", max_steps=4)
    straight.train()
    resumed = trainer("straight", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert torch.equal(logits(resumed.model), logits(straight.model))


def test_a_checkpoint_is_an_adapter(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make_trainer(
        base, tmp_path / "run", AutoQRAConfig(plan=mixed_plan(base)), save_strategy="steps", save_steps=2
    )
    trainer.train()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(loaded), logits(trainer.model))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_a_trainer_compiles_the_model(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    """transformers' own: TRL computes its loss with a kernel that Dynamo warns of."""
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=calibrated_plan(tiny_llama())))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", **settings
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in TOKENS]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        losses.append(trainer.train().training_loss)
    torch.compiler.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
