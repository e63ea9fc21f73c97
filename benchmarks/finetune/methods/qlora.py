"""QLoRA, also with rank-stabilized scaling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from trl import SFTConfig

from benchmarks.finetune.memory_model import memory_model_of
from benchmarks.finetune.method import Method, Prepared
from benchmarks.finetune.methods.lora import lora_config
from benchmarks.finetune.nf4_base import NF4_BITS, add_adapter, load_nf4_base, nf4_memory
from benchmarks.finetune.setting import Setting
from peft_autoqra.memory_estimate import MemoryEstimate


@dataclass(frozen=True, kw_only=True)
class Qlora:
    """PEFT's LoRA on bitsandbytes' NF4 (Dettmers et al. 2023).

    Attributes:
        rank: of every module.
        use_rslora: scale by ``lora_alpha / sqrt(rank)`` (Kalajdzievski 2023).
        bfloat16: adapters, gradients and optimizer states in bfloat16, as SFTTrainer makes them (TRL 1.16); else in
            float32, PEFT's default.
    """

    rank: int
    use_rslora: bool = False
    bfloat16: bool = False
    needs_budget: bool = False

    @property
    def name(self) -> str:
        """With the rank."""
        return f"qlora-{'rslora-' if self.use_rslora else ''}r{self.rank}{'-bf16' if self.bfloat16 else ''}"

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Load the base in NF4 and add adapters."""
        memory_model = memory_model_of(setting, args)
        ranks = dict.fromkeys(memory_model.modules, self.rank)
        model = add_adapter(load_nf4_base(setting), lora_config(self.rank, use_rslora=self.use_rslora))
        predicted = nf4_memory(memory_model, ranks)
        if self.bfloat16:
            predicted = in_bfloat16(predicted)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return Prepared(
            model=model,
            predicted=predicted,
            module_names=tuple(ranks),
            mean_bits=NF4_BITS,
            mean_rank=self.rank,
        )


def in_bfloat16(memory: MemoryEstimate) -> MemoryEstimate:
    """Bytes with half as large adapters, gradients and AdamW states; its step counts stay what they are."""
    return replace(
        memory,
        adapter_bytes=memory.adapter_bytes // 2,
        gradient_bytes=memory.gradient_bytes // 2,
        optimizer_bytes=memory.optimizer_bytes - memory.adapter_bytes,
    )


METHODS: tuple[Method, ...] = (
    Qlora(rank=4),
    Qlora(rank=8),
    Qlora(rank=16),
    Qlora(rank=16, bfloat16=True),
    Qlora(rank=64),
    Qlora(rank=64, use_rslora=True),
)
