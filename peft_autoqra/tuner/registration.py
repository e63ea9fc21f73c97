"""Making PEFT know the method; the only code that touches PEFT's registries."""

from __future__ import annotations

import warnings
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.config import PeftConfigMixin, _check_and_remove_unused_kwargs
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import FORMAT_VERSION, locate_file
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, PlanCalibration
from peft_autoqra.quant.decoded_linear import DecodedLinear
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.model import QuantLoRAModel

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
    CONFIG_KEYS_TO_CHECK[PeftType.LORA] += _BASE_KEYS


def _recognizing(original: Any) -> Any:
    @wraps(original)
    def from_peft_type(cls: type, **kwargs: Any) -> Any:
        if kwargs.get("peft_type") != PeftType.LORA or "autoqra_version" not in kwargs:
            return original(cls, **kwargs)
        version = kwargs["autoqra_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise InvalidPlanError(
                f"The adapter has AutoQRA format {version!r}, this peft_autoqra reads up to {FORMAT_VERSION}: upgrade "
                "with `pip install -U peft-autoqra`."
            )
        known, unknown = _check_and_remove_unused_kwargs(AutoQRAConfig, kwargs)
        if unknown:
            warnings.warn(
                f"Ignoring the keys {sorted(unknown)} of an adapter_config.json that a newer PEFT wrote.", stacklevel=3
            )
        return AutoQRAConfig(**known)

    return from_peft_type


def _with_calibration(original: Any) -> Any:
    @wraps(original)
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
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


def _locate_calibration(model_id: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""
    path = locate_file(prefix + ADAPTER_CALIBRATION_FILE, str(model_id), **hub_kwargs)
    if path is None:
        raise InvalidPlanError(
            f"{ADAPTER_CALIBRATION_FILE} is missing beside the adapter in {model_id!r}; without it the base cannot be "
            "quantized as it was in training. Copy it there."
        )
    return path
