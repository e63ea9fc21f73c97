"""LoRA over a linear layer of a mixed-bit base."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_autoqra.dense_layers import as_linear, dense_shape, make_dense_layer
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, dense_layer


class QuantLoRALinear(LoraLinear):  # type: ignore[misc]
    """``y = x Q^T + b + scaling * (x A^T) B^T`` with Q quantized, or left at 16 bits.

    Merging puts a dense layer, the dequantized weight plus the adapter, in the place of the base layer and keeps the
    latter aside. So merging loses nothing to a second quantization, and unmerging restores codes and weights exactly.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """As PEFT's ``lora.Linear``."""
        if config.fan_in_fan_out != isinstance(base_layer, Conv1D):  # true of this layer, whatever holds for others
            config = copy.copy(config)
            config.fan_in_fan_out = not config.fan_in_fan_out
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._unmerged_layer: list[Any] = []  # in a list, so that it is no submodule while merged
        self._merged_from_dtype: torch.dtype | None = None

    @property
    def unmerged_layer(self) -> Any:
        """The base layer, or what it was before merging."""
        return self._unmerged_layer[0] if self._unmerged_layer else self.base_layer

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
            quantized = isinstance(base, QUANTIZED_LAYERS)
            self.base_layer = as_linear(dense_layer(base)) if quantized else copy.deepcopy(base)
            self._merged_from_dtype = self.base_layer.weight.dtype
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
        """With what ``model.to(...)`` did to the merged layer meanwhile."""
        if self._unmerged_layer:
            merged = self.base_layer.weight
            restored = self._unmerged_layer.pop().to(merged.device)
            self.base_layer = restored if merged.dtype == self._merged_from_dtype else restored.to(merged.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in the place of this layer: merged, of the class that was quantized; or the base layer."""
        if not merge:
            if self.merged:
                self.unmerge()
            return self.base_layer
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not isinstance(self.unmerged_layer, QUANTIZED_LAYERS):
            return self.base_layer
        merged = self.base_layer
        dense: nn.Module = make_dense_layer(self.unmerged_layer.dense_class, merged.weight, merged.bias)
        return dense.train(self.training)

    def __repr__(self) -> str:
        """PEFT's convention: ``lora.`` and the class."""
        return super().__repr__().replace("lora.", "autoqra.", 1)
