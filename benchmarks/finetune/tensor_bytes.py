"""The bytes of what is really there, for the layers of every library compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor

from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_measurement import measure_memory
from peft_autoqra.quant.nf4 import NF4Linear


def measured_bytes(
    model: PeftModel, module_names: Iterable[str], optimizer: torch.optim.Optimizer | None = None
) -> MemoryEstimate:
    """As :func:`~peft_autoqra.memory_measurement.measure_memory`, which knows this package's layers and PEFT's LoRA.

    Args:
        model: with adapters on it.
        module_names: the targeted modules.
        optimizer: its states are counted where given, and the importances that AdaLoRA keeps beside them.
    """
    measured = measure_memory(model, module_names, optimizer)
    rank_counts = _num_bytes(_rank_counts(model))
    importances = _num_bytes(_importances(model)) if optimizer else 0
    return replace(
        measured,
        metadata_bytes=measured.metadata_bytes + _num_bytes(_nf4_scales(model)),
        untouched_bytes=measured.untouched_bytes - rank_counts,
        adapter_bytes=measured.adapter_bytes + rank_counts,
        optimizer_bytes=measured.optimizer_bytes + importances,
    )


def _nf4_scales(model: PeftModel) -> Iterator[Tensor]:
    """Of bitsandbytes' layers; they are neither parameters nor buffers."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit) and not isinstance(layer, NF4Linear):
            state = layer.weight.quant_state
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _rank_counts(model: PeftModel) -> Iterator[Tensor]:
    """AdaLoRA's number of ranks, a parameter of each module that is not trained."""
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer):
            yield from layer.ranknum.values()


def _importances(model: PeftModel) -> Iterator[Tensor]:
    if isinstance(model.base_model, AdaLoraModel):
        allocator = model.base_model.rankallocator
        for states in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            yield from states.values()


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())
