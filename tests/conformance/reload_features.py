"""Adapters saved and read again give the same to the last bit, on every way that leads to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from torch import nn

from tests.conformance.building import outputs, planned, trained
from tests.conformance.feature import FeatureGroup
from tests.conformance.models import ModelCase
from tests.conformance.trainer_features import make_trainer

GROUP = FeatureGroup("Reload, equal to the last bit")
_AUTO_CLASSES = {
    "CAUSAL_LM": AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    None: AutoPeftModel,
}
Reload = Callable[[ModelCase, Path, torch.dtype], nn.Module]


def load_base(case: ModelCase, folder: Path, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = case.auto_class.from_pretrained(folder / "base", dtype=dtype)
    return model


def peft_model(case: ModelCase, folder: Path, dtype: torch.dtype) -> nn.Module:
    return PeftModel.from_pretrained(load_base(case, folder, dtype), folder / "adapter")


def auto_peft_model(case: ModelCase, folder: Path, dtype: torch.dtype) -> nn.Module:
    return _AUTO_CLASSES[case.task_type].from_pretrained(folder / "adapter", dtype=dtype)


def load_adapter(case: ModelCase, folder: Path, dtype: torch.dtype) -> nn.Module:
    model = load_base(case, folder, dtype)
    model.load_adapter(str(folder / "adapter"))
    return model


def trainer_checkpoint(case: ModelCase, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Saved by Trainer after a step with a learning rate of 0, so that it has to equal the adapter."""
    model = PeftModel.from_pretrained(load_base(case, folder, dtype), folder / "adapter", is_trainable=True)
    settings = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 1}
    make_trainer(case, folder / "run", model, **settings).train()
    return PeftModel.from_pretrained(load_base(case, folder, dtype), folder / "run" / "checkpoint-1")


def _register(name: str, reload: Reload, dtype: torch.dtype) -> None:
    @GROUP.feature(f"{name}, {str(dtype).removeprefix('torch.')}")
    def check(case: ModelCase, tmp_path: Path) -> None:
        case.make().to(dtype).save_pretrained(tmp_path / "base")
        base = load_base(case, tmp_path, dtype)
        model = trained(case, base, plan=planned(case, base))
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(outputs(case, reload(case, tmp_path, dtype)), outputs(case, model))


for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    _register("`PeftModel.from_pretrained`", peft_model, _dtype)
    _register("`AutoPeftModel…from_pretrained`", auto_peft_model, _dtype)
    _register("`model.load_adapter` of transformers", load_adapter, _dtype)
    _register("a checkpoint of `Trainer`", trainer_checkpoint, _dtype)
