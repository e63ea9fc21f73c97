"""Counting the bytes of the tensors that are really there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.sharding import local_tensor


def measure_memory(
    model: nn.Module, module_names: Iterable[str], optimizer: torch.optim.Optimizer | None = None
) -> MemoryEstimate:
    """Bytes of a model as it is, tensor by tensor, shared ones counted once.

    Of tensors that FSDP2 sharded only this process's parts count.

    Args:
        model: the model or PeftModel.
        module_names: the targeted modules, as the plan names them.
        optimizer: its states are counted where given.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    targets = {name: _base_layer(base.get_submodule(name)) for name in module_names}
    weights = {id(t): t for layer in targets.values() for t in _weight_tensors(layer)}
    metadata = {id(t): t for layer in targets.values() for t in _metadata_tensors(layer)}
    tensors = {id(t): (name, t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    adapters = {key: t for key, (name, t) in tensors.items() if "lora_" in name}
    known = weights.keys() | metadata.keys() | adapters.keys()
    return MemoryEstimate(
        weight_bytes=_num_bytes(weights.values()),
        metadata_bytes=_num_bytes(metadata.values()),
        untouched_bytes=_num_bytes(t for key, (_, t) in tensors.items() if key not in known),
        adapter_bytes=_num_bytes(adapters.values()),
        gradient_bytes=_num_bytes(p.grad for p in model.parameters() if p.grad is not None),
        optimizer_bytes=_num_bytes(_optimizer_tensors(optimizer)) if optimizer else 0,
    )


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _weight_tensors(layer: nn.Module) -> list[Tensor]:
    return [layer.W_q] if isinstance(layer, QuantLinear | Int8Linear) else [layer.weight]  # type: ignore[list-item]


def _metadata_tensors(layer: nn.Module) -> Iterator[Tensor]:
    if isinstance(layer, QuantLinear):
        yield layer.scale_codes
        yield layer.scale_base
    elif isinstance(layer, Int8Linear):
        yield layer.scale_bytes
    elif isinstance(layer, NF4Linear):
        state = layer.quant_state  # the weight has lost it where FSDP2 sharded it
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in map(local_tensor, tensors))
