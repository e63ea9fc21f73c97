"""Making PEFT know the method; the only code that touches PEFT's registries."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import locate_file
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, PlanCalibration
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.model import QuantLoRAModel
from peft_autoqra.tuner.saved_config import read_saved_config


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
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, AutoQRAConfig) and config.calibration_digest:
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)  # type: ignore[attr-defined]
            path = _locate_calibration(pretrained_model_name_or_path, subfolder, hub_kwargs)
            config.calibration = PlanCalibration.load(path, config.calibration_digest)
        return config

    return from_pretrained


def _locate_calibration(model_id: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""
    path = locate_file(prefix + ADAPTER_CALIBRATION_FILE, str(model_id), **hub_kwargs)
    if path is None:
        raise InvalidPlanError(
            f"{ADAPTER_CALIBRATION_FILE} is missing beside the adapter in {model_id!r}; without it the base cannot be "
            "quantized as it was in training. Copy it there."
        )
    return path
