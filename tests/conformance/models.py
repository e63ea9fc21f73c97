"""One tiny random model of each architecture family that the suite runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 128
_TOKENS = torch.arange(24).view(2, 12) * 5 % VOCABULARY
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """An architecture.

    Attributes:
        name: column of the table.
        make: the model, with the same random weights every time.
        task_type: PEFT's; None where PEFT has none.
        auto_class: transformers' class that reads a checkpoint of it.
        linear: a linear layer (or Conv1D) of the first block, relative name of its kind.
        head: what is trained whole beside the adapters, for tasks with a new head.
        block: name of the list of blocks, for ``layers_to_transform``.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    task_type: str | None = "CAUSAL_LM"
    auto_class: Any = AutoModelForCausalLM
    linear: str
    head: tuple[str, ...] = ()
    block: str = "layers"
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: {"input_ids": _TOKENS.clone()})

    def __str__(self) -> str:
        """For pytest's names."""
        return self.name


def _seeded(model_class: Any, config_class: Any, **settings: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = model_class(config_class(**settings)).eval()
        return model

    return make


def _t5_inputs() -> dict[str, Tensor]:
    return {"input_ids": _TOKENS.clone(), "decoder_input_ids": _TOKENS[:, :5].clone()}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}


CASES = (
    ModelCase(name="Llama", make=_seeded(LlamaForCausalLM, LlamaConfig, **_GROUPED), linear="q_proj"),
    ModelCase(
        name="Llama, tied",
        make=_seeded(LlamaForCausalLM, LlamaConfig, **_GROUPED, tie_word_embeddings=True),
        linear="q_proj",
    ),
    ModelCase(name="Qwen2", make=_seeded(Qwen2ForCausalLM, Qwen2Config, **_GROUPED), linear="q_proj"),
    ModelCase(name="Qwen3", make=_seeded(Qwen3ForCausalLM, Qwen3Config, **_GROUPED, head_dim=8), linear="q_proj"),
    ModelCase(
        name="Gemma 3",
        make=_seeded(Gemma3ForCausalLM, Gemma3TextConfig, **_GROUPED, head_dim=8, sliding_window=8),
        linear="q_proj",
    ),
    ModelCase(name="Mistral", make=_seeded(MistralForCausalLM, MistralConfig, **_GROUPED), linear="q_proj"),
    ModelCase(name="Phi", make=_seeded(PhiForCausalLM, PhiConfig, **_GROUPED), linear="q_proj"),
    ModelCase(name="Phi-3", make=_seeded(Phi3ForCausalLM, Phi3Config, **_GROUPED), linear="qkv_proj"),
    ModelCase(
        name="GPT-2",
        make=_seeded(
            GPT2LMHeadModel,
            GPT2Config,
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        linear="c_attn",
        block="h",
    ),
    ModelCase(
        name="OPT",
        make=_seeded(
            OPTForCausalLM,
            OPTConfig,
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            pad_token_id=3,
        ),
        linear="q_proj",
    ),
    ModelCase(
        name="T5",
        make=_seeded(
            T5ForConditionalGeneration,
            T5Config,
            vocab_size=VOCABULARY,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=3,
            decoder_start_token_id=3,
        ),
        task_type="SEQ_2_SEQ_LM",
        auto_class=AutoModelForSeq2SeqLM,
        linear="wo",
        block="block",
        inputs=_t5_inputs,
    ),
    ModelCase(
        name="Llama classifier",
        make=_seeded(LlamaForSequenceClassification, LlamaConfig, **_GROUPED, num_labels=3),
        task_type="SEQ_CLS",
        auto_class=AutoModelForSequenceClassification,
        linear="q_proj",
        head=("score",),
    ),
    ModelCase(
        name="ViT",
        make=_seeded(
            ViTForImageClassification,
            ViTConfig,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_labels=3,
        ),
        task_type=None,
        auto_class=AutoModelForImageClassification,
        linear="q_proj",
        head=("classifier",),
        block="layers",
        inputs=_image,
    ),
    ModelCase(
        name="Mixtral",
        make=_seeded(MixtralForCausalLM, MixtralConfig, **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        linear="q_proj",
    ),
)
