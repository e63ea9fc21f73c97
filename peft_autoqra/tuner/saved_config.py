"""Reading the settings of an adapter_config.json, which a stranger may have written."""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

from peft.config import _check_and_remove_unused_kwargs

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_MODULES
from peft_autoqra.plan_file import FORMAT_VERSION
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.patterns import check_patterns_of_file

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("r", "bits", "group_size"), (int,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode"), (bool,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "bits_pattern"), (dict,)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (str, list)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (list,)),
    **dict.fromkeys(("quant_backend", "base_fingerprint", "calibration_digest", "bias"), (str,)),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type"), (str,)),
    "layers_to_transform": (int, list),
    "init_lora_weights": (bool, str),
}
"""Fields that decide what becomes of the model; PEFT looks after the others."""


def read_saved_config(settings: Mapping[str, Any]) -> AutoQRAConfig:
    """The configuration of a saved adapter; nothing but these settings is read.

    Args:
        settings: content of adapter_config.json.

    Raises:
        InvalidPlanError: a newer format, values of the wrong type, patterns that could take for ever, or values that
            no configuration can have.
    """
    try:
        _check_types(settings)
        check_patterns_of_file(settings)
        known, unknown = _check_and_remove_unused_kwargs(AutoQRAConfig, settings)
        config = AutoQRAConfig(**known)
    except InvalidPlanError:
        raise
    except (ArithmeticError, AttributeError, ImportError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InvalidPlanError(
            f"The adapter_config.json is damaged ({error}); save or download the adapter again."
        ) from error
    if unknown:
        names = reprlib.repr(sorted(unknown))
        warnings.warn(f"Ignoring the keys {names} of an adapter_config.json that a newer PEFT wrote.", stacklevel=4)
    return config


def _check_types(settings: Mapping[str, Any]) -> None:
    version = settings["autoqra_version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InvalidPlanError(
            f"The adapter has AutoQRA format {reprlib.repr(version)}, this peft_autoqra reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install -U peft-autoqra`."
        )
    if settings.get("plan") is not None:
        raise InvalidPlanError(_damage("plan", settings["plan"]))  # a path or repository that someone else chose
    for field, types in _TYPES.items():
        if settings.get(field) is not None and not _has_type(settings[field], types):
            raise InvalidPlanError(_damage(field, settings[field]))
    for field in ("lora_alpha", "lora_dropout"):
        if not math.isfinite(settings.get(field) or 0):
            raise InvalidPlanError(_damage(field, settings[field]))
    if not 0 <= (settings.get("lora_dropout") or 0) <= 1:
        raise InvalidPlanError(_damage("lora_dropout", settings["lora_dropout"]))
    for alpha in (settings.get("alpha_pattern") or {}).values():
        if not _has_type(alpha, (int, float)) or not math.isfinite(alpha):
            raise InvalidPlanError(_damage("alpha_pattern", alpha))


def _has_type(value: object, types: tuple[type, ...]) -> bool:
    """Of one of these types; True is no number, lists hold one type, and containers are as small as real ones."""
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, list):
        inside = (int,) if int in types else (str,)
        return list in types and len(value) <= MAX_MODULES and all(_has_type(part, inside) for part in value)
    return isinstance(value, types) and not (isinstance(value, dict) and len(value) > MAX_MODULES)


def _damage(field: str, value: object) -> str:
    return (
        f"The adapter_config.json is damaged ({field} is {reprlib.repr(value)}); save or download the adapter again."
    )
