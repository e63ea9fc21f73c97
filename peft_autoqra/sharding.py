"""Quantized layers and adapters in parts: what FSDP2 needs before, and whole tensors of them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_autoqra.quant.nf4 import NF4Linear


def prepare_for_sharding(model: nn.Module, accelerator: Accelerator) -> None:
    """Make a model such that FSDP2 shards all of it; call it before ``trainer.train()``.

    - accelerate leaves bitsandbytes' 4-bit codes whole in every process, as bytes. Seen as a floating dtype they are
      shared out; it is the one that mixed precision would convert to, so that nothing is converted. Their scales stay
      whole. Native layers need nothing.
    - Adapters without values get some, as accelerate finds the optimizer's parameters by their addresses; the first
      process then sends the true ones.
    - The model's outputs keep their dtype, as accelerate would round the loss to bfloat16.

    Does nothing without FSDP2.

    Args:
        model: with adapters.
        accelerator: the trainer's.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    dtype = torch.bfloat16
    if plugin.mixed_precision_policy is not None:
        dtype = plugin.mixed_precision_policy.param_dtype or dtype
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            layer.store_codes_as(dtype, accelerator.device)
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_meta:
                layer.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="cpu")))


def whole_trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is trained, by the model's names, on the CPU; every process must call this.

    Args:
        model: sharded or not.
    """
    return {name: whole_tensor(tensor) for name, tensor in model.named_parameters() if tensor.requires_grad}


def load_whole_adapter(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapter that is trained from the tensors in its file, in any number of processes.

    Args:
        model: sharded or not.
        tensors: all that the file holds, in every process.

    Raises:
        KeyError: a tensor is missing.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # PEFT renames the tensors and does not copy them
    in_file = get_peft_model_state_dict(model, state_dict=trained, adapter_name=model.active_adapter)
    with torch.no_grad():
        for name, own in in_file.items():
            local_tensor(own).copy_(local_tensor(_placed_as(tensors[name], own)))


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors on the CPU; every process must call this.

    The same optimizer in one process has a state of the same layout.
    """
    content: dict[str, Any] = optimizer.state_dict()
    states = {
        index: {key: whole_tensor(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        for index, state in content["state"].items()
    }
    return {**content, "state": states}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Fill an optimizer from what :func:`whole_optimizer_state` gave, in any number of processes.

    Args:
        optimizer: over the same parameters, sharded or not.
        content: the whole state, in every process.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {key: _state_as(value, parameters[index]) for key, value in state.items()}
        for index, state in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": states})


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU, from all processes' parts; every process must call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _state_as(value: Any, parameter: Tensor) -> Any:
    return _placed_as(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value


def _placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Sharded as ``like`` is; every process cuts its part out of its own copy."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.to_local().device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
