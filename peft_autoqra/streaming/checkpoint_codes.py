"""What the files of a quantized checkpoint say of its codes, against what config.json says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.quantized_weight import group_scales
from peft_autoqra.safetensors_file import TensorEntry, open_safetensors, tensor_entries

_DTYPES = {torch.uint8: "U8", torch.int8: "I8"}
_CODES = "W_q"


def check_code_entries(model: nn.Module, module_names: Iterable[str], files: Iterable[str | Path]) -> None:
    """Compare the headers of a checkpoint's files with the empty layers that wait for it; no tensor is read.

    transformers would cast codes of another type, and start a layer that config.json forgot at random, with a warning.

    Args:
        model: on the meta device, with empty quantized layers.
        module_names: of these layers.
        files: of the checkpoint; those of other formats than safetensors are left out.

    Raises:
        InvalidPlanError: codes of another type or shape, or of a layer that config.json does not name.
    """
    wanted = {
        f"{name}.{kind}": tensor
        for name in module_names
        for kind, tensor in model.get_submodule(name).named_parameters(recurse=False)
        if kind != "bias"
    }
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # with or without its head a model's names differ by it
    wanted |= {prefix + key: t for key, t in wanted.items()} | {k.removeprefix(prefix): t for k, t in wanted.items()}
    num_layers = sum(isinstance(module, QuantLinear | Int8Linear) for module in model.modules())
    with_codes = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with open_safetensors(Path(file)) as opened:
            entries = tensor_entries(opened, Path(file))
        _check_entries(file, entries, wanted)
        with_codes |= {key for key in entries if key.rpartition(".")[2] == _CODES}
    if len(with_codes) > num_layers:
        unknown = sorted(with_codes - wanted.keys()) or sorted(with_codes)
        raise InvalidPlanError(
            f"The checkpoint holds codes of {len(with_codes)} layers and config.json lists {num_layers}; it lacks "
            f"{[key.rpartition('.')[0] for key in unknown[:3]]}. Save or download the model again."
        )


def _check_entries(file: str | Path, entries: Mapping[str, TensorEntry], wanted: Mapping[str, Tensor]) -> None:
    for key in entries.keys() & wanted.keys():
        entry = TensorEntry(_DTYPES[wanted[key].dtype], tuple(wanted[key].shape))
        if entries[key] != entry:
            raise InvalidPlanError(
                f"{file} holds {key!r} as {entries[key]}, and config.json asks for {entry}; save or download the "
                "model again."
            )


def check_filled(model: nn.Module, module_names: Iterable[str]) -> None:
    """Whether every quantized layer got all its tensors, with scales that can be used.

    Args:
        model: that was loaded.
        module_names: of the layers that config.json lists.

    Raises:
        InvalidPlanError: a layer did not.
    """
    for name in module_names:
        layer = model.get_submodule(name)
        tensors = layer.parameters(recurse=False)
        if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            raise InvalidPlanError(f"The checkpoint lacks tensors of {name!r}; save or download the model again.")
        if not all(torch.isfinite(values).all() for values in _scales(layer)):
            raise InvalidPlanError(
                f"The checkpoint's scales of {name!r} are not finite; save or download the model again."
            )


def _scales(layer: nn.Module) -> tuple[Tensor, ...]:
    """The scales and offsets that a layer's bytes are decoded with; none for a layer that is not quantized."""
    if isinstance(layer, QuantLinear):
        return group_scales(layer.bits, layer.scale_codes, layer.scale_base)
    if isinstance(layer, Int8Linear):
        return (layer.scale_bytes.view(torch.float32),)
    return ()
