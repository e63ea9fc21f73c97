"""Finding a plan: in a plan's folder, an adapter, a quantized base, the directory of a search, or on the hub.

Only the plan is read: no calibration, no weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft_autoqra import plan_file
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.hub_files import locate_file
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_file import ADAPTER_FILE, FORMAT_VERSION, PLAN_FILE

PlanKind = Literal["plan", "adapter", "quantized base"]
_PLAN_FOLDER, _TRIALS_FILE, _MODEL_CONFIG = "plan", "trials.jsonl", "config.json"
_WEIGHTS, _BASE_MODEL_KEY = "model.safetensors", "autoqra_base_model"  # as ``streaming.base_card`` writes it


@dataclass(frozen=True, kw_only=True)
class FoundPlan:
    """A plan and where it was.

    Attributes:
        plan: without calibration; that of a quantized base has no ranks.
        kind: what it belongs to.
        place: folder, or hub id and revision.
    """

    plan: BitRankPlan
    kind: PlanKind
    place: str


def find_plan(source: str) -> FoundPlan:
    """Read a plan wherever there is one.

    Args:
        source: folder of a plan, an adapter or a quantized base, ``output_dir`` of a search, or a hub id, which
            ``@REVISION`` may follow.

    Raises:
        InvalidPlanError: no plan there, damaged, or of a newer format.
        HubError: the repository or revision does not exist, gives no access, or cannot be reached.
    """
    if not source.strip():
        raise InvalidPlanError("No plan is named: the folder or hub id is empty.")
    place, revision = _split_revision(source)
    folder = Path(place)
    if not (folder / PLAN_FILE).is_file() and (folder / _PLAN_FOLDER / PLAN_FILE).is_file():
        place = str(folder / _PLAN_FOLDER)  # of a search
    shown = f"{place}@{revision}" if revision else place
    for filename, kind in _PLACES.items():
        path = locate_file(filename, place, revision=revision)
        plan = None if path is None else _read(path, place, revision)
        if plan is not None:
            return FoundPlan(plan=plan, kind=kind, place=shown)
    if (folder / _TRIALS_FILE).is_file():
        raise InvalidPlanError(f"The search in {place} has found no plan yet; let it end first.")
    raise InvalidPlanError(
        f"There is no plan in {shown!r}; give the folder or repository of a plan, an adapter or a quantized base, or "
        "the output_dir of a search."
    )


_PLACES: dict[str, PlanKind] = {PLAN_FILE: "plan", ADAPTER_FILE: "adapter", _MODEL_CONFIG: "quantized base"}


def _split_revision(source: str) -> tuple[str, str | None]:
    if Path(source).exists() or "@" not in source:
        return source, None
    place, _, revision = source.rpartition("@")
    return place, revision or None


def _read(path: Path, place: str, revision: str | None) -> BitRankPlan | None:
    """None where the file is of another package."""
    if path.name == _MODEL_CONFIG:
        return _of_quantized_base(path)
    header = plan_file.read_header(path)
    if path.name == ADAPTER_FILE and "autoqra_plan" not in header:
        return None
    plan = BitRankPlan.from_metadata(header, f"{place}@{revision}" if revision else str(path))
    if path.name == PLAN_FILE:
        layers = plan.values()
        plan_file.check_tensors(path, [layer.bits for layer in layers], [layer.rank for layer in layers])
    return plan


def _of_quantized_base(path: Path) -> BitRankPlan | None:
    """Bits as config.json lists them; reading it as transformers does would take seconds of imports."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
        if settings.get("quant_method") != "autoqra":
            return None
        return _from_settings(settings, _name_in(path.with_name(_WEIGHTS)))
    except InvalidPlanError as error:
        raise InvalidPlanError(f"The quantization_config in {path} cannot be used: {error}") from error
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InvalidPlanError(f"{path} is damaged ({error}); save or download the model again.") from error


def _name_in(weights: Path) -> str | None:
    """Hub id of the model that was quantized; not known where its weights were not downloaded."""
    return plan_file.read_header(weights).get(_BASE_MODEL_KEY) if weights.is_file() else None


def _from_settings(settings: dict[str, Any], base_model: str | None) -> BitRankPlan:
    if settings["autoqra_version"] not in range(1, FORMAT_VERSION + 1):
        raise InvalidPlanError(
            f"It has format {settings['autoqra_version']!r:.20}, this peft_autoqra reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install -U peft-autoqra`."
        )
    modules = settings.get("modules")
    if not modules:
        raise InvalidPlanError("It does not say what each layer became; save the model again.")
    return BitRankPlan(
        {name: LayerPlan(module["bits"], 0) for name, module in modules.items()},
        shapes={name: module["shape"] for name, module in modules.items()},
        quantizer=QuantizerSettings(backend=settings["quant_backend"], group_size=settings["group_size"]),
        base_model=BaseModelInfo(name_or_path=base_model, fingerprint=settings["base_fingerprint"]),
    )
