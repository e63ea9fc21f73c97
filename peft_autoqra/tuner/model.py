"""The tuner: LoraModel on a base that is quantized module by module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_autoqra.quant.backends import QUANTIZED_LAYERS, dense_linear
from peft_autoqra.tuner.config import COMPENSATE, AutoQRAConfig
from peft_autoqra.tuner.layer import QuantLoRALinear
from peft_autoqra.tuner.preparation import include_all_linear_layers, quantize_base, replace_layer


class QuantLoRAModel(LoraModel):  # type: ignore[misc]
    """LoRA with mixed weight bits and ranks.

    It takes the place of :class:`peft.LoraModel` for the LORA type and behaves like it for every configuration that is
    not an :class:`AutoQRAConfig`, except that it can put adapters on layers that this package quantized.

    Args:
        model: the base model; its layers are quantized in place.
        config: an :class:`AutoQRAConfig` or any ``LoraConfig``.
        adapter_name: name of the first adapter.

    Raises:
        InvalidPlanError: the configuration does not fit the model; the model is unchanged then.
    """

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if isinstance(peft_config, AutoQRAConfig):
            earlier = [c for c in self.peft_config.values() if c is not peft_config and isinstance(c, AutoQRAConfig)]
            peft_config.plan = quantize_base(model, peft_config, earlier)
            peft_config.base_fingerprint = peft_config.plan.base_model.fingerprint
        else:
            include_all_linear_layers(peft_config, model)

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        **kwargs: Any,
    ) -> None:
        if not isinstance(lora_config, AutoQRAConfig) or lora_config.init_lora_weights != COMPENSATE:
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, **kwargs)
            return
        plain = copy.copy(lora_config)
        plain.init_lora_weights = True
        super()._create_and_replace(plain, adapter_name, target, target_name, parent, **kwargs)
        start_at_correction(getattr(parent, target_name), adapter_name, lora_config, kwargs["current_key"])

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        planned = isinstance(lora_config, AutoQRAConfig) and type(target) is nn.Linear
        if planned or isinstance(target, QUANTIZED_LAYERS):
            return QuantLoRALinear(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        """After merging, layers without an adapter are dequantized too, so that the model reloads anywhere."""
        if not merge:
            for module in self.model.modules():
                if isinstance(module, QuantLoRALinear) and module.merged:
                    module.unmerge()
        unloaded = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        if merge:
            dequantize_base(unloaded)
        return unloaded


def dequantize_base(model: nn.Module) -> None:
    """Put dense layers in the place of the quantized ones of a model without adapters, which makes it ordinary."""
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, QUANTIZED_LAYERS)]
    for name, module in quantized:
        replace_layer(model, name, dense_linear(module))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "autoqra":
        quantizer.remove_quantization_config(model)  # else it would be saved as a quantized checkpoint


def start_at_correction(layer: LoraLayer, adapter_name: str, config: AutoQRAConfig, module_name: str) -> None:
    """Set ``scaling * B @ A`` of one adapter layer to the calibrated correction; layers without one stay as they are.

    Args:
        layer: the adapter layer.
        adapter_name: which of its adapters.
        config: holds the calibration.
        module_name: as the plan names it.
    """
    correction = config.calibration.corrections.get(module_name) if config.calibration else None
    weight_a, weight_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if correction is None or weight_a.device.type == "meta":  # meta: low_cpu_mem_usage, the saved weights follow
        return
    rank = weight_a.shape[0]
    with torch.no_grad():
        weight_a.copy_(torch.from_numpy(correction.right[:rank]))
        weight_b.copy_(torch.from_numpy(correction.left[:, :rank]).float() / layer.scaling[adapter_name])
