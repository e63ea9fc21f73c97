"""A plan's adapters on a model whose weights are dequantized already; what a search trains."""

from __future__ import annotations

from dataclasses import fields

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_autoqra.tuner.config import COMPENSATE, AutoQRAConfig
from peft_autoqra.tuner.model import start_adapter


def add_dense_adapter(model: nn.Module, config: AutoQRAConfig) -> PeftModel:
    """Put the adapters of a configuration on a dense model, with their initial values, without quantizing anything.

    Args:
        model: its weights are taken as they are; layers are wrapped in place, ``unload()`` takes them out again.
        config: with a plan.
    """
    values = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init}
    if values["init_lora_weights"] == COMPENSATE:
        values["init_lora_weights"] = True
    values["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())  # PEFT would warn
    peft_model = get_peft_model(model, LoraConfig(**values))
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            start_adapter(module, "default", config, name)
    return peft_model
