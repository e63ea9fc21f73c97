"""QLoRA, also with rank-stabilized scaling."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig

from benchmarks.finetune.memory_model import memory_model_of
from benchmarks.finetune.method import Method, Prepared
from benchmarks.finetune.methods.lora import lora_config
from benchmarks.finetune.nf4_base import NF4_BITS, add_adapter, load_nf4_base, nf4_memory
from benchmarks.finetune.setting import Setting


@dataclass(frozen=True, kw_only=True)
class Qlora:
    """PEFT's LoRA on bitsandbytes' NF4 (Dettmers et al. 2023).

    Attributes:
        rank: of every module.
        use_rslora: scale by ``lora_alpha / sqrt(rank)`` (Kalajdzievski 2023).
    """

    rank: int
    use_rslora: bool = False
    needs_budget: bool = False

    @property
    def name(self) -> str:
        """With the rank."""
        return f"qlora-{'rslora-' if self.use_rslora else ''}r{self.rank}"

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Load the base in NF4 and add adapters."""
        memory_model = memory_model_of(setting, args)
        ranks = dict.fromkeys(memory_model.modules, self.rank)
        return Prepared(
            model=add_adapter(load_nf4_base(setting), lora_config(self.rank, use_rslora=self.use_rslora)),
            predicted=nf4_memory(memory_model, ranks),
            module_names=tuple(ranks),
            mean_bits=NF4_BITS,
            mean_rank=self.rank,
        )


METHODS: tuple[Method, ...] = (
    Qlora(rank=8),
    Qlora(rank=16),
    Qlora(rank=64),
    Qlora(rank=64, use_rslora=True),
)
