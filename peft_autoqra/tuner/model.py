"""The tuner: LoraModel on a base that is quantized module by module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_autoqra.dense_layers import is_dense_layer
from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, dense_layer
from peft_autoqra.target_modules import check_no_fused_experts, is_all_linear
from peft_autoqra.tuner.config import COMPENSATE, AutoQRAConfig, check_leaves_weights, exact_pattern
from peft_autoqra.tuner.layer import QuantLoRALinear
from peft_autoqra.tuner.preparation import quantize_base, replace_layer
from peft_autoqra.tuner.rank_scaling import row_factor
from peft_autoqra.tuner.target_checks import check_not_saved_whole
from peft_autoqra.tuner.targets import base_layers, include_all_linear_layers


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

    note_base: ClassVar[Callable[[nn.Module, BitRankPlan | None], None] | None] = None
    """Set by ``streaming``: records on an unloaded base how it is quantized, so that it can be saved."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Refuse what PEFT's own preparations would hide, then inject."""
        config = self.peft_config[adapter_name]
        if isinstance(config, AutoQRAConfig) and is_all_linear(config.target_modules):
            check_no_fused_experts(model)  # PEFT turns them into target_parameters
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        quantized = [name for name, layer in base_layers(model).items() if isinstance(layer, QUANTIZED_LAYERS)]
        if quantized:
            check_leaves_weights(peft_config)
        super()._prepare_model(peft_config, model)
        if isinstance(peft_config, AutoQRAConfig):
            earlier = [c for c in self.peft_config.values() if c is not peft_config and isinstance(c, AutoQRAConfig)]
            peft_config.plan = quantize_base(model, peft_config, earlier)
            peft_config.base_fingerprint = peft_config.plan.base_model.fingerprint
        else:
            check_not_saved_whole(quantized, peft_config)
            include_all_linear_layers(peft_config, model)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's, whose result has wrong scalings with rsLoRA and cannot be read again with ranks by module."""
        first = self.peft_config.get(adapters[0])
        if not isinstance(first, AutoQRAConfig) or adapter_name in self.peft_config:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
            return
        self.peft_config[adapters[0]] = plain = copy.copy(first)
        plain.use_rslora = False  # PEFT folds the scalings in and counts on lora_alpha / r being 1
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self.peft_config[adapters[0]] = first
        self._note_ranks(adapter_name)

    def _note_ranks(self, adapter_name: str) -> None:
        """Make the configuration say what ranks the layers really have, each with a scaling of 1."""
        config = self.peft_config[adapter_name]
        layers = dict(config.plan)
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                rank = module.lora_A[adapter_name].weight.shape[0]
                module.r[adapter_name] = module.lora_alpha[adapter_name] = rank
                layers[name] = LayerPlan(layers[name].bits, rank)
                if rank != config.r:
                    config.rank_pattern[exact_pattern(name)] = config.alpha_pattern[exact_pattern(name)] = rank
        config.plan = config.plan.replace(layers=layers)

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        **kwargs: Any,
    ) -> None:
        if not isinstance(lora_config, AutoQRAConfig):
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, **kwargs)
            return
        name, compensates = kwargs["current_key"], lora_config.init_lora_weights == COMPENSATE
        own = copy.copy(lora_config)
        own.init_lora_weights = True if compensates else lora_config.init_lora_weights
        exact = exact_pattern(name)
        if exact in lora_config.bits_pattern:  # PEFT would try the patterns of all modules on each
            ranks, alphas = lora_config.rank_pattern, lora_config.alpha_pattern
            own.rank_pattern = {exact: ranks[exact]} if exact in ranks else {}
            own.alpha_pattern = {exact: alphas[exact]} if exact in alphas else alphas
        super()._create_and_replace(own, adapter_name, target, target_name, parent, **kwargs)
        start_adapter(getattr(parent, target_name), adapter_name, lora_config, name)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        planned = isinstance(lora_config, AutoQRAConfig) and is_dense_layer(target)
        if planned or isinstance(target, QUANTIZED_LAYERS):
            return QuantLoRALinear(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        """A merged model is dequantized as a whole and reloads anywhere; one without adapters stays quantized."""
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        if merge:
            dequantize_base(unloaded)
        elif QuantLoRAModel.note_base is not None:
            plans = (config.plan for config in self.peft_config.values() if isinstance(config, AutoQRAConfig))
            QuantLoRAModel.note_base(unloaded, next(plans, None))
        return unloaded


def dequantize_base(model: nn.Module) -> None:
    """Put dense layers in the place of the quantized ones of a model without adapters, which makes it ordinary."""
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, QUANTIZED_LAYERS)]
    for name, module in quantized:
        replace_layer(model, name, dense_layer(module))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "autoqra":
        quantizer.remove_quantization_config(model)  # else it would be saved as a quantized checkpoint


def start_adapter(layer: LoraLayer, adapter_name: str, config: AutoQRAConfig, module_name: str) -> None:
    """Set ``scaling * B @ A`` of one adapter layer to the calibrated correction, where the configuration starts there.

    Where it scales by rank, rows of A are as long as that asks for, and a B that PEFT did not leave at zero, too; see
    :mod:`peft_autoqra.tuner.rank_scaling`.

    Args:
        layer: the adapter layer, as PEFT started it.
        adapter_name: which of its adapters.
        config: with the calibration and, for anything to change, the plan.
        module_name: as the plan names it.
    """
    correction = None
    if config.init_lora_weights == COMPENSATE and config.calibration is not None:
        correction = config.calibration.corrections.get(module_name)
    scales_by_rank = config.scales_by_rank(module_name)
    if correction is None and not scales_by_rank:  # an embedding, say, which has no lora_A
        return
    weight_a, weight_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if weight_a.device.type == "meta":  # low_cpu_mem_usage, the saved weights follow
        return
    rank = weight_a.shape[0]
    factor = row_factor(rank) if scales_by_rank else 1.0
    with torch.no_grad():
        if correction is None:
            weight_a.mul_(factor)
            weight_b.mul_(factor)
            return
        weight_a.copy_(torch.from_numpy(correction.right[:rank]).float() * factor)
        left = torch.from_numpy(correction.left[:, :rank]).float()
        weight_b.copy_(left / (factor * layer.scaling[adapter_name]))
