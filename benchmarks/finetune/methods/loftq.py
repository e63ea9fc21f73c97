"""LoftQ's initialization on NF4."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.loftq_utils import replace_lora_weights_loftq
from torch.overrides import TorchFunctionMode
from trl import SFTConfig

from benchmarks.finetune.memory_model import memory_model_of
from benchmarks.finetune.method import Method, Prepared, Spent
from benchmarks.finetune.methods.lora import lora_config
from benchmarks.finetune.nf4_base import NF4_BITS, add_adapter, load_nf4_base, nf4_memory
from benchmarks.finetune.setting import Setting


class _CudaIsThis(TorchFunctionMode):
    """``tensor.to(device="cuda")`` stays where the model is: PEFT 0.21 has that device written into LoftQ."""

    def __init__(self, device: torch.device) -> None:
        """Until it is left."""
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with the other device."""
        given = dict(kwargs or {})
        if func is torch.Tensor.to and given.get("device") == "cuda":
            given["device"] = self._device
        return func(*args, **given)


@dataclass(frozen=True, kw_only=True)
class LoftQ:
    """PEFT's LoftQ for bitsandbytes models (Li et al. 2023): adapters start at the SVD of what NF4 lost, one pass.

    Its ``lora_alpha`` is the rank: PEFT's initialization takes no notice of the scaling, so at any other scaling than
    1 the adapters would miss what they are to correct.

    Attributes:
        rank: of every module.
    """

    rank: int
    needs_budget: bool = False

    @property
    def name(self) -> str:
        """With the rank."""
        return f"qlora-loftq-r{self.rank}"

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Load the base in NF4, add adapters and read the unquantized weights again."""
        memory_model = memory_model_of(setting, args)
        ranks = dict.fromkeys(memory_model.modules, self.rank)
        model = add_adapter(load_nf4_base(setting), lora_config(self.rank, lora_alpha=self.rank))
        start = time.perf_counter()
        _replace_weights(model, setting.model_id)
        return Prepared(
            model=model,
            predicted=nf4_memory(memory_model, ranks),
            module_names=tuple(ranks),
            mean_bits=NF4_BITS,
            mean_rank=self.rank,
            spent=Spent(seconds=time.perf_counter() - start),
        )


def _replace_weights(model: PeftModel, model_id: str) -> None:
    with _CudaIsThis(model.device):
        replace_lora_weights_loftq(model, model_path=model_id if Path(model_id).is_dir() else None)


METHODS: tuple[Method, ...] = (LoftQ(rank=16),)
