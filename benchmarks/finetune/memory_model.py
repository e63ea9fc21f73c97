"""Closed forms of a setting's memory."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTConfig

from benchmarks.finetune.setting import Setting
from peft_autoqra import MemoryModel


def memory_model_of(setting: Setting, args: SFTConfig) -> MemoryModel:
    """Of all linear layers but the head, without reading a weight.

    Args:
        setting: its model, in bfloat16.
        args: names the optimizer.
    """
    config = AutoConfig.from_pretrained(setting.model_id)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return MemoryModel.from_model(model, optimizer=args.optim)
