"""Reading the settings of an adapter_config.json, which a stranger may have written."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

from peft.config import _check_and_remove_unused_kwargs

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_MODULES
from peft_autoqra.plan import MAX_SIZE
from peft_autoqra.plan_file import FORMAT_VERSION
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.patterns import MAX_LIST_LENGTH, check_patterns_of_file

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("r", "bits", "group_size"), (int,)),
    "lora_dropout": (int, float),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode"), (bool,)),
    "base_is_quantized": (bool,),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "bits_pattern"), (dict,)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (str, list)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (list,)),
    **dict.fromkeys(("quant_backend", "base_fingerprint", "calibration_digest", "bias"), (str,)),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type"), (str,)),
    "init_lora_weights": (bool, str),
}
"""Fields that decide what becomes of the model; PEFT looks after the others."""

_MAX_PARAMETERS = 1024
"""PEFT tries each on each parameter."""

_MAX_INDICES = 2**20
"""No vocabulary is larger."""


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
    _check_indices(settings)
    if len(settings.get("target_parameters") or ()) > _MAX_PARAMETERS:
        raise InvalidPlanError(_damage("target_parameters", settings["target_parameters"]))
    if not 0 <= (settings.get("lora_dropout") or 0) <= 1:
        raise InvalidPlanError(_damage("lora_dropout", settings["lora_dropout"]))


def _check_indices(settings: Mapping[str, Any]) -> None:
    """Of layers, an index or several; of tokens, several, or several by the name of their embedding."""
    layers, tokens = settings.get("layers_to_transform"), settings.get("trainable_token_indices")
    if layers is not None and not _are_indices(layers if isinstance(layers, list) else [layers]):
        raise InvalidPlanError(_damage("layers_to_transform", layers))
    by_name = tokens if isinstance(tokens, dict) else {"embed_tokens": tokens}
    if tokens is not None and not (
        0 < len(by_name) <= MAX_LIST_LENGTH and all(by_name) and all(_are_indices(part) for part in by_name.values())
    ):
        raise InvalidPlanError(_damage("trainable_token_indices", tokens))


def _are_indices(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_INDICES
        and all(type(index) is int and 0 <= index <= MAX_SIZE for index in value)
    )


def _has_type(value: object, types: tuple[type, ...]) -> bool:
    """Of one of these types; True is no number, lists hold names, and containers are as small as real ones."""
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, list):
        are_names = all(isinstance(part, str) and part for part in value)
        return list in types and len(value) <= MAX_MODULES and are_names
    return isinstance(value, types) and not (isinstance(value, dict) and len(value) > MAX_MODULES)


def _damage(field: str, value: object) -> str:
    return (
        f"The adapter_config.json is damaged ({field} is {reprlib.repr(value)}); save or download the adapter again."
    )
