"""Checkpoints of the tiny model, and models quantized from them in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig
from peft_autoqra.quant.backends import QUANTIZED_LAYERS
from tests.conftest import TinyLlamaFactory


def save_base(make: TinyLlamaFactory, folder: Path, *, shard_size: str = "1GB", **overrides: Any) -> Path:
    make(**overrides).save_pretrained(folder / "base", max_shard_size=shard_size)
    return folder / "base"


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def load_streaming(folder: Path, config: AutoQRAQuantConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def adapt(base: nn.Module, **settings: Any) -> nn.Module:
    return get_peft_model(base, AutoQRAConfig(**settings, task_type="CAUSAL_LM"))


def codes(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of all quantized layers."""
    return {
        f"{name}.{key}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, QUANTIZED_LAYERS)
        for key, tensor in layer.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def assert_same_codes(one: nn.Module, other: nn.Module) -> None:
    expected, found = codes(one), codes(other)
    assert expected
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
