"""Plans, adapters and quantized bases as files: which files make one, and whether they are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, CALIBRATION_FILE
from peft_autoqra.plan_file import ADAPTER_FILE, PLAN_FILE, read_header
from peft_autoqra.streaming.quant_config import METHOD, AutoQRAQuantConfig
from peft_autoqra.tuner.config import AutoQRAConfig, exact_pattern

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"

# Of files with any content.
_UNUSABLE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def plan_files(folder: Path) -> list[str]:
    """Names of the files of a plan; none where there is no plan.

    Raises:
        InvalidPlanError: a damaged plan, or one without its calibration.
    """
    if not (folder / PLAN_FILE).is_file():
        return []
    plan = BitRankPlan.from_pretrained(folder)
    return [PLAN_FILE, *([CALIBRATION_FILE] if plan.calibration is not None else [])]


def adapter_files(folder: Path) -> list[str]:
    """Names of the files of an adapter; none where there is no adapter.

    Raises:
        InvalidPlanError: one that is damaged, incomplete, or not of this package.
    """
    there = [name for name in (ADAPTER_CONFIG, ADAPTER_FILE) if (folder / name).is_file()]
    if not there:
        return []
    if len(there) == 1:
        missing = ({ADAPTER_CONFIG, ADAPTER_FILE} - set(there)).pop()
        raise InvalidPlanError(f"{missing} is missing beside {folder / there[0]}; save the adapter again.")
    config = read_adapter_config(folder)
    _check_adapter(folder / ADAPTER_FILE, config)
    return [*there, *([ADAPTER_CALIBRATION_FILE] if config.calibration is not None else [])]


def read_adapter_config(folder: Path) -> AutoQRAConfig:
    """The configuration of an adapter, with its calibration.

    Raises:
        InvalidPlanError: it is damaged, of a newer format, or not of this package.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except InvalidPlanError:
        raise
    except _UNUSABLE as error:
        raise InvalidPlanError(
            f"{folder / ADAPTER_CONFIG} cannot be read ({error}); save the adapter again."
        ) from error
    if not isinstance(config, AutoQRAConfig):
        raise InvalidPlanError(
            f"{folder} holds an adapter of {config.peft_type} that AutoQRA did not make; push it with PEFT "
            "(model.push_to_hub)."
        )
    return config


def _check_adapter(path: Path, config: AutoQRAConfig) -> None:
    """The file's plan, where it has one, is that of the configuration, and every adapter is of the rank it says."""
    header, shapes = read_header(path), _tensor_shapes(path)
    if "autoqra_plan" not in header:  # transformers' own way of saving adapters leaves it out
        return
    for name, layer in BitRankPlan.from_metadata(header, str(path)).items():
        key = exact_pattern(name)
        bits, rank = config.bits_pattern.get(key, config.bits), (config.rank_pattern or {}).get(key, config.r)
        if layer.bits != bits or layer.rank not in (0, rank):
            raise InvalidPlanError(
                f"The plan in {path} gives {name!r} {layer.bits} bits and rank {layer.rank}, and {ADAPTER_CONFIG} "
                f"{bits} bits and rank {rank}; save the adapter again."
            )
        adapter = {key: shape for key, shape in shapes.items() if key.startswith(f"base_model.model.{name}.lora_")}
        ranks = {shape[0] for key, shape in adapter.items() if key.endswith("lora_A.weight")}
        if bool(adapter) != bool(layer.rank) or ranks - {layer.rank}:
            raise InvalidPlanError(
                f"The adapter of {name!r} in {path} is not of rank {layer.rank}, as its plan says; save it again."
            )


def base_files(folder: Path) -> list[str]:
    """Names of the files of a quantized model; none where there is no model or another one.

    Raises:
        InvalidPlanError: one that is damaged or incomplete.
    """
    config = read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {}
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return []
    _check_model_config(folder / MODEL_CONFIG, config)
    if (folder / _WEIGHTS).is_file():
        _tensor_shapes(folder / _WEIGHTS)
        return [MODEL_CONFIG, _WEIGHTS]
    if not (folder / _WEIGHTS_INDEX).is_file():
        raise InvalidPlanError(f"There is no {_WEIGHTS} in {folder}; save the model again.")
    return [MODEL_CONFIG, _WEIGHTS_INDEX, *_shards(folder)]


def _check_model_config(path: Path, config: dict[str, Any]) -> None:
    try:
        modules = AutoQRAQuantConfig.from_dict(config["quantization_config"]).modules
    except InvalidPlanError:
        raise
    except _UNUSABLE as error:
        raise InvalidPlanError(f"{path} cannot be read ({error}); save the model again.") from error
    if not modules:
        raise InvalidPlanError(f"{path} lists no quantized modules; save the model again.")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise InvalidPlanError(f"architectures in {path} is no list of names; save the model again.")


def _shards(folder: Path) -> list[str]:
    weight_map = read_json(folder / _WEIGHTS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(Path(str(f)).name != f for f in weight_map.values()):
        raise InvalidPlanError(f"{folder / _WEIGHTS_INDEX} does not list the files beside it; save the model again.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise InvalidPlanError(f"{shard} is missing beside {folder / _WEIGHTS_INDEX}; save the model again.")
        expected = {name for name, where in weight_map.items() if where == shard}
        if expected != _tensor_shapes(folder / shard).keys():
            raise InvalidPlanError(f"{folder / shard} holds other tensors than its index says; save the model again.")
    return shards


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape; that the header can be read says that the file is as long as it should be."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 -- no mapping
    except (OSError, SafetensorError) as error:
        raise InvalidPlanError(f"{path} is damaged ({error}); save it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InvalidPlanError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise InvalidPlanError(f"{path} cannot be read ({error}); save the model again.") from error
    if not isinstance(content, dict):
        raise InvalidPlanError(f"{path} must hold a JSON object; save the model again.")
    return content
