"""AdaLoRA on NF4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig

from benchmarks.finetune.memory_model import memory_model_of
from benchmarks.finetune.method import Method, Prepared
from benchmarks.finetune.methods.lora import LORA_ALPHA
from benchmarks.finetune.nf4_base import NF4_BITS, add_adapter, load_nf4_base, nf4_memory
from benchmarks.finetune.setting import Setting
from peft_autoqra import MemoryModel
from peft_autoqra.memory_estimate import MemoryEstimate

FLOAT_BYTES = 4
ADAMW_STATES = 2
IMPORTANCE_STATES = 3
"""Tensors as large as the adapters that AdaLoRA keeps: importance, its mean and its uncertainty."""
WARMUP_FRACTION = 0.1
FINAL_FRACTION = 0.3
NUM_ALLOCATIONS = 100
"""Of the ranks in a run, where it has as many steps."""


class RankAllocation(TrainerCallback):
    """Moves ranks between modules: after the optimizer's step and before the gradients go, as PEFT's documents say."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        """For the tuner that is trained."""
        self._tuner = tuner

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step's gradients and mask ranks."""
        self._tuner.update_and_allocate(state.global_step)


@dataclass(frozen=True, kw_only=True)
class QAdaLora:
    """PEFT's AdaLoRA on bitsandbytes' NF4 (Zhang et al. 2023).

    Ranks are given up during the run but stay allocated, so memory is that of the ranks at its start. The schedule is
    a share of the run's steps; the regularization of orthogonality has PEFT's weight, and is in the model's own loss
    alone: a trainer that computes another one leaves it out, as TRL's does by default.

    Attributes:
        initial_rank: of every module.
        rank: of a module at the end, on average.
    """

    initial_rank: int
    rank: int
    name: str = "qlora-adalora"
    needs_budget: bool = False

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Load the base in NF4 and add adapters."""
        memory_model = memory_model_of(setting, args)
        ranks = dict.fromkeys(memory_model.modules, self.initial_rank)
        model = add_adapter(load_nf4_base(setting), self._config(args.max_steps))
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:  # a constant, which PEFT 0.21 lets the optimizer train on this base
                parameter.requires_grad_(False)
        return Prepared(
            model=model,
            predicted=adalora_memory(memory_model, ranks),
            module_names=tuple(ranks),
            mean_bits=NF4_BITS,
            mean_rank=self.rank,
            callbacks=(RankAllocation(model.base_model),),
        )

    def _config(self, max_steps: int) -> AdaLoraConfig:
        return AdaLoraConfig(
            init_r=self.initial_rank,
            target_r=self.rank,
            tinit=int(WARMUP_FRACTION * max_steps),
            tfinal=int(FINAL_FRACTION * max_steps),
            deltaT=max(1, max_steps // NUM_ALLOCATIONS),
            total_step=max_steps,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            bias="none",
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )


def adalora_memory(memory_model: MemoryModel, ranks: Mapping[str, int]) -> MemoryEstimate:
    """Bytes of NF4 with AdaLoRA's adapters; importances are counted with the optimizer's states.

    Beside LoRA's two matrices a module has one singular value a rank, which is trained, and the number of its ranks.
    """
    lora = nf4_memory(memory_model, ranks)
    singular_bytes = FLOAT_BYTES * sum(ranks.values())
    count_bytes = FLOAT_BYTES * len(ranks)  # of ranks, and of AdamW's steps on the singular values
    trained_bytes = lora.adapter_bytes + singular_bytes
    return replace(
        lora,
        adapter_bytes=trained_bytes + count_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=lora.optimizer_bytes
        + ADAMW_STATES * singular_bytes
        + count_bytes
        + IMPORTANCE_STATES * trained_bytes,
    )


METHODS: tuple[Method, ...] = (QAdaLora(initial_rank=24, rank=16),)
