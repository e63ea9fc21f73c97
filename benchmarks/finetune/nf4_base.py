"""QLoRA's base: NF4 with double quantization, by bitsandbytes, transformers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from benchmarks.finetune.setting import Setting
from peft_autoqra import LayerPlan, MemoryModel
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import QuantizerSettings

NF4_BITS = 4


def load_nf4_base(setting: Setting) -> PreTrainedModel:
    """Quantized while it is read; everything but the linear layers stays in bfloat16.

    ``prepare_model_for_kbit_training`` is not called: it would make norms and embeddings float32, which doubles their
    bytes, and what else it does, PEFT and the trainer do. TRL's trainers do not call it either.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        setting.model_id,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
        attn_implementation=setting.recipe.attn_implementation,
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with AVX512-BF16 a forward pass in evaluation mode would repack the weight for good, and training
            # after it would get no gradient through the layer (bitsandbytes 0.50.2).
            module.support_avx512bf16_for_cpu = False
    return model


def add_adapter(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """PEFT's adapter in float32, which is PEFT's default, as this package's own.

    SFTTrainer makes the adapters of models with this flag bfloat16 (TRL 1.16), optimizer states and all. That takes
    half of their memory, and loses updates below their precision; this comparison holds all methods to float32.
    """
    model = get_peft_model(base, config)
    base.is_loaded_in_4bit = False
    return model


def nf4_memory(memory_model: MemoryModel, ranks: Mapping[str, int]) -> MemoryEstimate:
    """Bytes of NF4 with adapters of these ranks, by module."""
    plan = {name: LayerPlan(NF4_BITS, rank) for name, rank in ranks.items()}
    return memory_model.estimate(plan, QuantizerSettings(backend="bitsandbytes"))
