"""EVA's initialization on NF4."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from peft import EvaConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from trl import SFTConfig

from benchmarks.finetune.memory_model import memory_model_of
from benchmarks.finetune.method import Method, NotApplicable, Prepared, Spent
from benchmarks.finetune.methods.lora import lora_config
from benchmarks.finetune.nf4_base import NF4_BITS, add_adapter, load_nf4_base, nf4_memory
from benchmarks.finetune.setting import Setting
from peft_autoqra.evaluation.sft import mean_length
from peft_autoqra.search_costs import FORWARD_SHARE

IGNORED_LABEL = -100
NUM_SEQUENCES = 256
"""That the SVD sees, over and over until it has converged."""


class CountedForward:
    """A forward pass that counts tokens.

    Attributes:
        num_tokens: passed so far, padding included.
    """

    def __init__(self) -> None:
        """None passed yet."""
        self.num_tokens = 0

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """One pass."""
        self.num_tokens += inputs["input_ids"].numel()
        return model(**inputs)


@dataclass(frozen=True)
class Directions:
    """Where A starts.

    Attributes:
        by_module: PEFT's state dict of EVA, ``[rank, in_features]`` each.
        seconds: that they took.
        num_tokens: passed forward for them.
    """

    by_module: dict[str, Tensor]
    seconds: float
    num_tokens: int

    def save(self, path: Path) -> None:
        """Write all of it, or nothing."""
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.by_module.items()}  # some are shared
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"seconds": str(self.seconds), "num_tokens": str(self.num_tokens)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Directions:
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            known = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return cls(tensors, float(known["seconds"]), int(known["num_tokens"]))


@dataclass(frozen=True, kw_only=True)
class Eva:
    """PEFT's EVA on bitsandbytes' NF4 (Paischer et al. 2024): A starts at the principal directions of the inputs.

    With PEFT's own ``rho`` of 2 ranks move between modules, and bytes with them, since modules are of different sizes.

    Attributes:
        rank: of every module, or their mean where ``rho`` lets ranks move.
        rho: largest rank in units of ``rank``.
    """

    rank: int
    rho: float
    needs_budget: bool = False

    @property
    def name(self) -> str:
        """With the rank."""
        return f"qlora-eva-r{self.rank}"

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Load the base in NF4, add adapters and start them at the directions, which are kept for other runs.

        Raises:
            NotApplicable: no batch has enough tokens; PEFT's loop would not end.
        """
        config = lora_config(self.rank, init_lora_weights="eva", eva_config=EvaConfig(rho=self.rho))
        memory_model = memory_model_of(setting, args)
        base = load_nf4_base(setting)
        with warnings.catch_warnings():  # what it advises saves memory, and leaves the adapters in bfloat16
            warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
            model = add_adapter(base, config)
        directions = self._directions(model, setting)
        initialize_lora_eva_weights(model, eva_state_dict=directions.by_module)
        for parameter in model.parameters():
            if parameter.requires_grad:  # where a rank moved, PEFT made new adapters, in bfloat16
                parameter.data = parameter.data.float()
        ranks = dict.fromkeys(memory_model.modules, 0) | adapter_ranks(model)
        run_tokens = args.max_steps * setting.recipe.batch_size * mean_length(setting.data.train)
        return Prepared(
            model=model,
            predicted=nf4_memory(memory_model, ranks),
            module_names=tuple(ranks),
            mean_bits=NF4_BITS,
            mean_rank=float(np.mean(list(ranks.values()))),
            spent=Spent(seconds=directions.seconds, cost=FORWARD_SHARE * directions.num_tokens / run_tokens),
        )

    def _directions(self, model: PeftModel, setting: Setting) -> Directions:
        """From the file, or computed and written to it; they depend on nothing but the base and the data."""
        path = setting.folder / f"{self.name}-rho{self.rho}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                self._computed(model, setting).save(path)
            return Directions.load(path)

    def _computed(self, model: PeftModel, setting: Setting) -> Directions:
        batches = self._batches(setting)
        start, forward = time.perf_counter(), CountedForward()
        by_module = get_eva_state_dict(model, batches, forward_fn=forward, show_progress_bar=False)
        return Directions(by_module, time.perf_counter() - start, forward.num_tokens)

    def _batches(self, setting: Setting) -> list[Mapping[str, Tensor]]:
        num_components = round(self.rank * self.rho)
        given = setting.data.batches(setting.data.train, NUM_SEQUENCES)
        batches = [batch for batch in given if (batch["labels"] != IGNORED_LABEL).sum() >= num_components]
        if not batches:
            raise NotApplicable(f"{self.name} needs batches of {num_components} predicted tokens; raise batch_size.")
        return batches


def adapter_ranks(model: PeftModel) -> dict[str, int]:
    """Ranks by module, as the adapters that are there have them."""
    modules = model.get_base_model().named_modules()
    return {name: module.r["default"] for name, module in modules if isinstance(module, LoraLayer)}


METHODS: tuple[Method, ...] = (Eva(rank=16, rho=2.0),)
