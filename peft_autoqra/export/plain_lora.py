"""An adapter as ordinary LoRA: one rank, and a scale of 1, for readers that ignore patterns and rank stabilization.

vLLM takes ``lora_alpha / r`` of the configuration for every module (releases before it learned of patterns), llama.cpp
``lora_alpha`` over the rank of each tensor. With all tensors padded to one rank, ``lora_alpha = r`` and the scale
multiplied into B both come out at 1, and so does PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from peft_autoqra.errors import ExportError
from peft_autoqra.export.adapter_config import CONFIG_FILE
from peft_autoqra.export.export_folder import export_folder
from peft_autoqra.hub_files import locate_file
from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.tuner.targets import matching_keys

VLLM_MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be (``MaxLoRARanks`` in ``vllm/config/lora.py``); an adapter's rank is at most
that."""

_LORA_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_EMBEDDING_COPY = ".base_layer.weight"
"""PEFT saves the unchanged embedding beside its adapter; vLLM and llama.cpp skip it."""
_BEYOND_PLAIN_LORA = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of B",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "replicated layers",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields of ``LoraConfig`` that make of an adapter more than A and B."""
_INITS_CHANGING_BASE = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True)
class PlainLora:
    """Configuration and tensors of an ordinary LoRA adapter.

    Attributes:
        config: ``lora_alpha = r`` and no patterns.
        tensors: name as PEFT saves it to A ``[r, in_features]`` or B ``[out_features, r]``, float32.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]

    @property
    def vllm_max_lora_rank(self) -> int | None:
        """The smallest ``--max-lora-rank`` that vLLM needs; None where it allows none that large."""
        return next((rank for rank in VLLM_MAX_LORA_RANKS if rank >= self.config.r), None)


def export_plain_lora(
    adapter: str | Path | PeftModel, output_dir: str | Path, *, adapter_name: str = "default", rank: int | None = None
) -> PlainLora:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card of an ordinary LoRA adapter.

    It computes what the adapter does, up to float32 rounding, on the base that it was trained on, *dequantized*
    (:func:`~peft_autoqra.export.merged_model.export_dequantized_base`). On the original 16-bit base it is approximate.

    Args:
        adapter: folder or hub id of a saved adapter, or a model with adapters.
        output_dir: new, empty or an earlier export.
        adapter_name: which adapter of a model.
        rank: to pad to; the adapter's largest by default.

    Returns:
        What was written.

    Raises:
        ExportError: there is no adapter, it holds more than plain LoRA can, ``rank`` is too small, or ``output_dir``
            holds other files. Nothing is written then.
    """
    with export_folder(output_dir, "plain-lora") as folder:
        if isinstance(adapter, PeftModel):
            lora = plain_lora(*_of_model(adapter, adapter_name), rank=rank)
        else:
            lora = plain_lora(*_read(str(adapter)), rank=rank)
        save_file(dict(lora.tensors), folder / ADAPTER_FILE, metadata={"format": "pt"})
        lora.config.save_pretrained(str(folder))
        (folder / "README.md").write_text(_card(lora), encoding="utf-8")
    return lora


def plain_lora(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, rank: int | None = None) -> PlainLora:
    """Pad every module to one rank and fold its scale into B.

    Args:
        settings: content of an ``adapter_config.json``.
        tensors: of the adapter, named as PEFT saves them.
        rank: to pad to; the largest by default.

    Raises:
        ExportError: more than plain LoRA can hold, or a rank below the largest.
    """
    _check_settings(settings)
    pairs = _pairs(tensors)
    largest = max(a.shape[0] for a, _ in pairs.values())
    padded_rank = largest if rank is None else rank
    if padded_rank < largest:
        raise ExportError(f"rank={rank} is below the adapter's largest rank, {largest}; give at least that.")
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module_name, side = _parse(name)
        if side == "A":
            plain[name] = pad(tensor.float(), (0, 0, 0, padded_rank - tensor.shape[0])).contiguous()
        elif side == "B":
            scaled = tensor.float() * _scale(settings, module_name, tensor.shape[1])
            plain[name] = pad(scaled, (0, padded_rank - tensor.shape[1])).contiguous()
    config = LoraConfig(
        r=padded_rank,
        lora_alpha=padded_rank,
        target_modules=sorted(pairs),
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        revision=settings.get("revision"),
        fan_in_fan_out=settings.get("fan_in_fan_out", False),
        inference_mode=True,
    )
    config.target_modules = sorted(pairs)  # PEFT makes a set of it, which has another order in every process
    return PlainLora(config, plain)


def _of_model(model: PeftModel, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if adapter_name not in model.peft_config:
        raise ExportError(f"The model has no adapter {adapter_name!r}; it has {sorted(model.peft_config)}.")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    settings = model.peft_config[adapter_name].to_dict()
    return settings, {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _read(adapter: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    paths = [locate_file(filename, adapter) for filename in (CONFIG_FILE, ADAPTER_FILE)]
    config_path, tensors_path = paths
    if config_path is None or tensors_path is None:
        missing = CONFIG_FILE if config_path is None else ADAPTER_FILE
        raise ExportError(f"There is no {missing} in {adapter!r}; give the folder or repository of a saved adapter.")
    try:
        settings, tensors = json.loads(config_path.read_text(encoding="utf-8")), load_file(tensors_path)
    except (ValueError, SafetensorError) as error:
        raise ExportError(f"The adapter in {adapter!r} is damaged ({error}); save or download it again.") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ExportError(f"The adapter in {adapter!r} is not LoRA; only LoRA adapters can be exported.")
    return settings, tensors


def _check_settings(settings: Mapping[str, Any]) -> None:
    more = [what for field, what in _BEYOND_PLAIN_LORA.items() if settings.get(field)]
    if settings.get("bias", "none") != "none":
        more.append("trained biases")
    if str(settings.get("init_lora_weights")).lower().startswith(_INITS_CHANGING_BASE):
        more.append(f"the changed base of init_lora_weights={settings['init_lora_weights']!r}")
    if more:
        raise ExportError(
            f"The adapter holds {', '.join(more)}, which readers of plain LoRA do not know; export the merged model "
            "instead."
        )


def _parse(name: str) -> tuple[str, str]:
    """Module name and ``"A"`` or ``"B"``; two empty texts for the copy of an embedding.

    Raises:
        ExportError: a tensor that plain LoRA does not have.
    """
    if name.endswith(_EMBEDDING_COPY):
        return "", ""
    match = _LORA_TENSOR.fullmatch(name)
    if match is None:
        raise ExportError(
            f"The adapter holds {name!r}, which is neither A nor B of a LoRA layer, so readers of plain LoRA do not "
            "know it; export the merged model instead."
        )
    return match[1], match[2]


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name to A ``[rank, in_features]`` and B ``[out_features, rank]``."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module_name, side = _parse(name)
        if side:
            sides.setdefault(module_name, {})[side] = tensor
    for module_name, found in sides.items():
        shapes = [tuple(found[side].shape) for side in sorted(found)]
        if len(found) < 2 or any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ExportError(
                f"The adapter of {module_name!r} has tensors of shapes {shapes}; plain LoRA needs A [rank, in] and B "
                "[out, rank]. Convolutions cannot be exported; otherwise save the adapter again."
            )
    if not sides:
        raise ExportError("The adapter holds no LoRA layers; there is nothing to export.")
    return {module_name: (found["A"], found["B"]) for module_name, found in sides.items()}


def _scale(settings: Mapping[str, Any], module_name: str, rank: int) -> float:
    """As PEFT's LoRA layers scale the product of B and A."""
    alphas = settings.get("alpha_pattern") or {}
    default = settings.get("lora_alpha", LoraConfig.lora_alpha)
    alpha = alphas.get(matching_keys(alphas, [module_name]).get(module_name), default)
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _card(lora: PlainLora) -> str:
    base = lora.config.base_model_name_or_path
    named = f"`{base}`" if base else "its base model"
    max_rank = lora.vllm_max_lora_rank
    vllm = f"`--max-lora-rank {max_rank}`" if max_rank else "not possible: its largest `--max-lora-rank` is 512"
    return f"""---
library_name: peft
tags:
- lora
---

# LoRA adapter for {named}, dequantized

An ordinary LoRA adapter of rank {lora.config.r} for all modules, with `lora_alpha = r`. It was trained by
`peft-autoqra` on a *quantized* {named}.

- On that base, dequantized (`autoqra export ADAPTER --to base`), it computes what was trained.
- On the original 16-bit base it is approximate: the adapter was trained together with the quantization error, and
  partly makes up for it; without that error this part is noise.

vLLM: {vllm}. llama.cpp: `convert_lora_to_gguf.py --base DEQUANTIZED_BASE THIS_FOLDER`.
"""
