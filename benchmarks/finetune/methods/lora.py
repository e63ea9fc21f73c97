"""LoRA on the unquantized base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from benchmarks.finetune.memory_model import memory_model_of
from benchmarks.finetune.method import Method, Prepared
from benchmarks.finetune.setting import Setting
from peft_autoqra import LayerPlan
from peft_autoqra.plan import DENSE_BITS

LORA_ALPHA = 32


def lora_config(rank: int, *, lora_alpha: int = LORA_ALPHA, **settings: Any) -> LoraConfig:
    """Adapters on all linear layers but the head, as every rival has them.

    Args:
        rank: of all.
        lora_alpha: of the scaling ``lora_alpha / rank``.
        settings: what a rival sets beside.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        **settings,
    )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """PEFT's LoRA at 16 bits (Hu et al. 2021).

    Attributes:
        rank: of every module.
    """

    rank: int
    needs_budget: bool = False

    @property
    def name(self) -> str:
        """With the rank."""
        return f"lora-r{self.rank}"

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Add adapters to the base."""
        memory_model = memory_model_of(setting, args)
        layers = {name: LayerPlan(DENSE_BITS, self.rank) for name in memory_model.modules}
        return Prepared(
            model=get_peft_model(setting.load_base(), lora_config(self.rank)),
            predicted=memory_model.estimate(layers),
            module_names=tuple(layers),
            mean_bits=DENSE_BITS,
            mean_rank=self.rank,
        )


METHODS: tuple[Method, ...] = (Lora(rank=16),)
