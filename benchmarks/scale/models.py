"""Shapes of Llama-like models from 1B to 405B parameters, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_autoqra.dense_layers import DenseLayer
from peft_autoqra.memory import MemoryModel
from peft_autoqra.target_modules import linear_targets

# of the published models: Llama 3.2 1B and 3B, Llama 3.1 8B, 70B and 405B; 14B and 32B have the shapes of Qwen2.5
# without its biases
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"layers": 16, "hidden": 2048, "mlp": 8192, "heads": 32, "vocabulary": 128_256, "tied": True},
    "3B": {"layers": 28, "hidden": 3072, "mlp": 8192, "heads": 24, "vocabulary": 128_256, "tied": True},
    "8B": {"layers": 32, "hidden": 4096, "mlp": 14_336, "heads": 32, "vocabulary": 128_256, "tied": False},
    "14B": {"layers": 48, "hidden": 5120, "mlp": 13_824, "heads": 40, "vocabulary": 152_064, "tied": False},
    "32B": {"layers": 64, "hidden": 5120, "mlp": 27_648, "heads": 40, "vocabulary": 152_064, "tied": False},
    "70B": {"layers": 80, "hidden": 8192, "mlp": 28_672, "heads": 64, "vocabulary": 128_256, "tied": False},
    "405B": {"layers": 126, "hidden": 16_384, "mlp": 53_248, "heads": 128, "vocabulary": 128_256, "tied": False},
}
NUM_KEY_VALUE_HEADS = 8


@dataclass(frozen=True, eq=False)
class ModelSize:
    """What decides the time and the memory of a model's trials.

    Attributes:
        name: of :data:`SHAPES`.
        config: of the model.
        memory: bytes of any plan, from the shapes at 16 bits.
        linears: the modules to plan, on the meta device.
        num_parameters: of the model; shared ones count once.
    """

    name: str
    config: LlamaConfig
    memory: MemoryModel
    linears: dict[str, DenseLayer]
    num_parameters: int

    @property
    def multiplied_weights(self) -> int:
        """Weights that a token is multiplied with: all linear layers and the head, not the embeddings."""
        return self.memory.num_weights + self.config.vocab_size * self.config.hidden_size

    @property
    def model_bytes(self) -> int:
        """At 16 bits."""
        return self.memory.untouched_bytes + 2 * self.memory.num_weights


@cache
def model_size(name: str) -> ModelSize:
    """The model of that size, in bfloat16, without memory for its weights."""
    shape = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        vocab_size=shape["vocabulary"],
        tie_word_embeddings=shape["tied"],
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return ModelSize(
        name=name,
        config=config,
        memory=MemoryModel.from_model(model),
        linears=linear_targets(model, "all-linear"),
        num_parameters=model.num_parameters(),
    )
