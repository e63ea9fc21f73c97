"""Saved adapters of tiny models, and what the model they were saved from computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from peft_autoqra import AutoQRAConfig
from peft_autoqra.plan import BaseModelInfo
from tests.tiny_data import word_tokenizer
from tests.tuner.synthetic import calibrated_plan, logits, randomize_adapters


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, its base on disk, and the logits of the two together."""

    base: Path
    adapter: Path
    model: PeftModel
    logits: Tensor


def tiny_qwen2() -> Qwen2ForCausalLM:
    """With biases of q, k and v that are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=128,
                max_position_embeddings=256,
                tie_word_embeddings=False,
            )
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def train(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Trained:
    """Save a model and, as if trained, an adapter of mixed ranks and bits.

    Args:
        model: the base.
        folder: where ``base`` and ``adapter`` are written.
        dtype: of the base checkpoint.
        settings: of the adapter's configuration; they replace the calibrated plan where they name bits.
    """
    base, adapter = folder / "base", folder / "adapter"
    model.to(dtype).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    dense = AutoModelForCausalLM.from_pretrained(base)
    if "bits" not in settings:
        plan = calibrated_plan(dense)
        info = BaseModelInfo(name_or_path=str(base), fingerprint=plan.base_model.fingerprint)
        settings["plan"] = plan.replace(base_model=info)
    peft_model = get_peft_model(dense, AutoQRAConfig(**settings, task_type="CAUSAL_LM"))
    randomize_adapters(peft_model)
    peft_model.save_pretrained(adapter)
    return Trained(base, adapter, peft_model, logits(peft_model))
