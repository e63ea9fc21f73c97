"""LoRA over a linear layer of a mixed-bit base."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_autoqra.dense_layers import dense_shape
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, dense_layer


class QuantLoRALinear(LoraLinear):  # type: ignore[misc]
    """``y = x Q^T + b + scaling * (x A^T) B^T`` with Q quantized, or left at 16 bits.

    Merging puts a dense layer, the dequantized weight plus the adapter, in the place of the base layer and keeps the
    latter aside. So merging loses nothing to a second quantization, and unmerging restores codes and weights exactly.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """As PEFT's ``lora.Linear``."""
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # and not what the configuration says of all layers
        self._unmerged_layer: list[nn.Module] = []  # in a list, so that it is no submodule while merged

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """Sizes of the base layer, whose class PEFT does not know."""
        if isinstance(module, QUANTIZED_LAYERS):
            return module.in_features, module.out_features
        return dense_shape(module)[::-1]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        """Where PEFT puts the adapter. No dtype: a detour over that of the base would round what was trained."""
        return next(base_layer.parameters()).device, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into a dense copy of the base layer."""
        if not self._unmerged_layer:
            base = self.base_layer
            self._unmerged_layer = [base]
            self._set_base_layer(dense_layer(base) if isinstance(base, QUANTIZED_LAYERS) else copy.deepcopy(base))
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            if not self.merged:
                self._restore()

    def unmerge(self) -> None:
        """Put the layer from before merging back; exact."""
        if not self.merged:
            super().unmerge()  # warns
            return
        self.merged_adapters.clear()
        self._restore()

    def _restore(self) -> None:
        if self._unmerged_layer:
            device = next(self.base_layer.parameters()).device
            self._set_base_layer(self._unmerged_layer.pop().to(device))

    def _set_base_layer(self, layer: nn.Module) -> None:
        self.base_layer = layer
        self.fan_in_fan_out = isinstance(layer, Conv1D)

    def __repr__(self) -> str:
        """PEFT's convention: ``lora.`` and the class."""
        return super().__repr__().replace("lora.", "autoqra.", 1)
