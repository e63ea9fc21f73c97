"""Making PEFT know the method; the only code that touches PEFT's registries."""

from __future__ import annotations

import copy
from functools import wraps
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import MixedModel
from peft.utils import PeftType, hotswap
from torch import Tensor

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.hub_files import locate_file
from peft_autoqra.plan import LayerPlan
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, PlanCalibration
from peft_autoqra.quant.decoded_linear import DecodedLinear
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.model import QuantLoRAModel
from peft_autoqra.tuner.saved_config import read_saved_config
from peft_autoqra.tuner.targets import matching_keys

_BASE_KEYS = ["bits_pattern", "group_size", "quant_backend", "calibration_digest", "base_fingerprint"]
"""An adapter is swapped for another in place only where both were trained on the same base."""


def register() -> None:
    """Register tuner and configuration; calling it again changes nothing.

    The type stays LORA in memory and on disk: PEFT's type enum is closed, everything that PEFT offers for LoRA
    (hot-swapping, mixed models, weight conversion) goes by the type, and PEFT without this package still reads the
    adapters. The key ``autoqra_version`` tells our configurations apart.
    """
    if PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType.LORA) is QuantLoRAModel:
        return
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QuantLoRAModel
    PeftConfigMixin.from_peft_type = classmethod(_recognizing(PeftConfigMixin.from_peft_type.__func__))
    PeftConfigMixin.from_pretrained = classmethod(_with_calibration(PeftConfigMixin.from_pretrained.__func__))
    PeftModel.get_nb_trainable_parameters = _counting_weights(PeftModel.get_nb_trainable_parameters)
    MixedModel._check_new_adapter_config = _refusing(MixedModel._check_new_adapter_config)
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA] += _BASE_KEYS
    hotswap.check_hotswap_configs_compatible = _whatever_alphas(hotswap.check_hotswap_configs_compatible)
    hotswap.hotswap_adapter_from_state_dict = _with_scalings(hotswap.hotswap_adapter_from_state_dict)


def _recognizing(original: Any) -> Any:
    @wraps(original)
    def from_peft_type(cls: type, **kwargs: Any) -> Any:
        if kwargs.get("peft_type") != PeftType.LORA or "autoqra_version" not in kwargs:
            return original(cls, **kwargs)
        return read_saved_config(kwargs)

    return from_peft_type


def _with_calibration(original: Any) -> Any:
    @wraps(original)
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        try:
            config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (AttributeError, RecursionError, TypeError, UnicodeDecodeError, JSONDecodeError) as error:
            if not issubclass(cls, AutoQRAConfig):  # what cannot be read may be of any method
                raise
            raise InvalidPlanError(
                f"The adapter_config.json in {pretrained_model_name_or_path!r} is damaged ({error}); save or download "
                "the adapter again."
            ) from error
        if isinstance(config, AutoQRAConfig) and config.calibration_digest:
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)  # type: ignore[attr-defined]
            path = _locate_calibration(pretrained_model_name_or_path, subfolder, hub_kwargs)
            config.calibration = PlanCalibration.load(path, config.calibration_digest)
        return config

    return from_pretrained


def _counting_weights(original: Any) -> Any:
    """PEFT counts elements of parameters, which are bytes of packed codes here."""

    @wraps(original)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        num_trainable, num_all = original(self)
        for module in self.modules():
            if isinstance(module, DecodedLinear):
                num_stored = sum(tensor.numel() for tensor in module.weight_tensors)
                num_all += module.out_features * module.in_features - num_stored
        return num_trainable, num_all

    return get_nb_trainable_parameters


def _refusing(original: Any) -> Any:
    @wraps(original)
    def _check_new_adapter_config(self: Any, config: Any) -> None:
        if isinstance(config, AutoQRAConfig):
            raise InvalidPlanError(
                "A PeftMixedModel (mixed=True) would not quantize the base. Leave out mixed=True: several AutoQRA and "
                "LoRA adapters can be used without."
            )
        original(self, config)

    return _check_new_adapter_config


def _whatever_alphas(original: Any) -> Any:
    """Adapters of other ranks have another ``alpha_pattern``, and :func:`_with_scalings` swaps that with them."""

    @wraps(original)
    def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
        if isinstance(config0, AutoQRAConfig) and isinstance(config1, AutoQRAConfig):
            config0, config1 = copy.copy(config0), copy.copy(config1)
            config0.alpha_pattern = config1.alpha_pattern = {}
        original(config0, config1)

    return check_hotswap_configs_compatible


def _with_scalings(original: Any) -> Any:
    """PEFT 0.21 matches patterns with names of tensors here, so that none ever does and all scalings are equal.

    It leaves the configuration of the adapter that was there before, too, with which the new one would be saved.
    """

    @wraps(original)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        original(model, state_dict, adapter_name, config, *args, **kwargs)
        if not isinstance(config, AutoQRAConfig):
            return
        own = model.peft_config[adapter_name]
        plan = own.plan if isinstance(own, AutoQRAConfig) else None
        if isinstance(own, AutoQRAConfig):
            for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
                setattr(own, field, copy.copy(getattr(config, field)))
        layers = {
            name.replace("_orig_mod.", "").removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and adapter_name in module.scaling
        }
        planned = dict(plan or {})
        rank_keys = matching_keys(config.rank_pattern, layers)
        alpha_keys = matching_keys(config.alpha_pattern, layers)
        for name, module in layers.items():
            rank = config.rank_pattern.get(rank_keys.get(name, ""), config.r)
            alpha = config.alpha_pattern.get(alpha_keys.get(name, ""), config.lora_alpha)
            hotswap._update_scaling(module, adapter_name, float(alpha / (rank**0.5 if config.use_rslora else rank)))
            _drop_padding(module, adapter_name, rank)
            if name in planned:
                planned[name] = LayerPlan(planned[name].bits, rank)
        if plan is not None:
            own.plan = plan.replace(layers=planned)

    return hotswap_adapter_from_state_dict


def _drop_padding(layer: LoraLayer, adapter_name: str, rank: int) -> None:
    """PEFT fills a smaller adapter up with zeros, which could not be read again; a compiled model keeps its shapes."""
    weight_a, weight_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if weight_a.shape[0] > rank and not isinstance(layer.scaling[adapter_name], Tensor):
        weight_a.data, weight_b.data = weight_a.data[:rank].clone(), weight_b.data[:, :rank].clone()
        layer.r[adapter_name] = rank


def _locate_calibration(model_id: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""
    path = locate_file(prefix + ADAPTER_CALIBRATION_FILE, str(model_id), **hub_kwargs)
    if path is None:
        raise InvalidPlanError(
            f"{ADAPTER_CALIBRATION_FILE} is missing beside the adapter in {model_id!r}; without it the base cannot be "
            "quantized as it was in training. Copy it there."
        )
    return path
