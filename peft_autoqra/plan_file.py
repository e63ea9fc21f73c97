"""The plan's file: bits and ranks as tensors, and everything as JSON in the header, with a version and a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_MODULES
from peft_autoqra.replaced_file import replaced_file
from peft_autoqra.safetensors_file import TensorEntry, check_can_be_read, open_safetensors, tensor_entries

PLAN_FILE = "autoqra_plan.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1

_PLAN = "autoqra_plan"
_VERSION = "autoqra_format_version"
_CHECKSUM = "autoqra_checksum"
_CALIBRATION_DIGEST = "autoqra_calibration_digest"
_MAX_TEXT_LENGTH = 2**25
_MAX_VALUES = 8 * MAX_MODULES  # a name, bits, a rank and two sizes each
_MAX_CONTAINERS = 2 * MAX_MODULES  # a shape each
_MAX_DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class PlanContent:
    """What the header holds: its types are checked, its values are for the plan to judge.

    Attributes:
        modules: names, each once.
        bits: of each module.
        rank: of each module.
        shapes: module name to (out_features, in_features).
        quantizer: arguments of ``QuantizerSettings``.
        initialization: of the adapters.
        base_model: arguments of ``BaseModelInfo``.
        memory: arguments of ``MemoryEstimate``.
        provenance: anything.

    Raises:
        InvalidPlanError: something has another type, or there are too many modules.
    """

    modules: Sequence[str]
    bits: Sequence[int]
    rank: Sequence[int]
    shapes: Mapping[str, Sequence[int]]
    quantizer: Mapping[str, Any]
    initialization: str
    base_model: Mapping[str, str | None]
    memory: Mapping[str, int] | None
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check the types of what JSON or a plan gave."""
        lists = {"modules": self.modules, "bits": self.bits, "rank": self.rank}
        for name, values in lists.items():
            kind = str if name == "modules" else int
            _check(isinstance(values, list) and all(type(value) is kind for value in values), name)
            _check(len(values) == len(self.modules), f"number of {name}")
        if len(self.modules) > MAX_MODULES:
            raise InvalidPlanError(f"It names {len(self.modules)} modules; at most {MAX_MODULES} are saved and read.")
        _check(len(set(self.modules)) == len(self.modules), "modules, one of which is named twice")
        for name in ("shapes", "quantizer", "base_model", "provenance"):
            _check(isinstance(getattr(self, name), dict), name)
        _check(isinstance(self.initialization, str), "initialization")
        _check(all(isinstance(value, str | None) for value in self.base_model.values()), "base_model")
        if self.memory is not None:
            _check(isinstance(self.memory, dict), "memory")
            _check(all(type(value) is int and value >= 0 for value in self.memory.values()), "memory")


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidPlanError(f"wrong {what}")


def write_header(content: PlanContent, calibration_digest: str) -> dict[str, str]:
    """The header of a safetensors file.

    Args:
        content: all of the plan.
        calibration_digest: of the calibration beside it; empty without one.

    Raises:
        InvalidPlanError: no one could read it again.
    """
    values = vars(content)
    text = json.dumps(values)
    excess = _excess(text) or (f"more than {_MAX_DEPTH} levels" if _is_deeper(values, _MAX_DEPTH) else None)
    if excess:
        raise InvalidPlanError(
            f"The plan takes {excess} as JSON, more than can be read again; leave out parts of its provenance."
        )
    metadata = {_VERSION: str(FORMAT_VERSION), _PLAN: text, _CALIBRATION_DIGEST: calibration_digest}
    return metadata | {_CHECKSUM: checksum(metadata)}


def read_header(path: Path) -> dict[str, str]:
    """Header of a plan or adapter file, as it is.

    Raises:
        InvalidPlanError: the file is damaged.
    """
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def parse_header(metadata: Mapping[str, str] | None, source: str) -> PlanContent:
    """Read what :func:`write_header` wrote.

    Args:
        metadata: header of a safetensors file.
        source: where it came from, for messages.

    Raises:
        InvalidPlanError: no plan, a newer format, a wrong checksum or content of another kind.
    """
    ours = {key: value for key, value in (metadata or {}).items() if str(key).startswith("autoqra_")}
    if _PLAN not in ours:
        raise InvalidPlanError(f"{source} holds no AutoQRA plan; was it written by BitRankPlan.save_pretrained?")
    if not all(isinstance(value, str) for value in ours.values()):
        raise InvalidPlanError(f"The plan in {source} is damaged (its header is no text); save or download it again.")
    version = ours.get(_VERSION, "")
    if version not in map(str, range(1, FORMAT_VERSION + 1)):
        raise InvalidPlanError(
            f"{source} has plan format {version[:20]!r}, this peft_autoqra reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install -U peft-autoqra`."
        )
    if ours.get(_CHECKSUM) != checksum(ours):
        raise InvalidPlanError(f"The plan in {source} is damaged (wrong checksum); save or download it again.")
    try:
        return PlanContent(**_parse_json(ours[_PLAN]))
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidPlanError(f"The plan in {source} is damaged ({error}); save or download it again.") from error


def calibration_digest(metadata: Mapping[str, str]) -> str:
    """Of the calibration that belongs to a plan's header; empty where there is none."""
    return metadata.get(_CALIBRATION_DIGEST, "")


def save(path: Path, content: PlanContent, metadata: Mapping[str, str]) -> None:
    """Write a plan's own file.

    Args:
        path: of the file.
        content: all of the plan.
        metadata: what :func:`write_header` made of it.

    Raises:
        InvalidPlanError: it is too large to be read again.
        StorageError: the disk does not take it; a file that was there is kept.
    """
    tensors = {"bits": np.array(content.bits, dtype=np.int32), "rank": np.array(content.rank, dtype=np.int32)}
    check_can_be_read(path, {name: tensor.shape for name, tensor in tensors.items()}, metadata)
    with replaced_file(path) as partial:
        save_file(tensors, partial, metadata=dict(metadata))


def check_tensors(path: Path, bits: Sequence[int], ranks: Sequence[int]) -> None:
    """Whether a plan's own file holds the tensors that its header describes; they are read only where they fit.

    Args:
        path: of the file.
        bits: as the header says.
        ranks: likewise.

    Raises:
        InvalidPlanError: it does not.
    """
    wanted = TensorEntry("I32", (len(bits),))
    with open_safetensors(path) as file:
        fits = len(file.keys()) == 2 and tensor_entries(file, path) == {"bits": wanted, "rank": wanted}
        if fits and (file.get_tensor("bits").tolist(), file.get_tensor("rank").tolist()) == (list(bits), list(ranks)):
            return
    raise InvalidPlanError(f"Tensors and header of {path} disagree; save or download it again.")


def checksum(metadata: Mapping[str, str]) -> str:
    """SHA-256 of everything of ours in a header but the checksum itself."""
    ours = sorted((key, value) for key, value in metadata.items() if key.startswith("autoqra_") and key != _CHECKSUM)
    return hashlib.sha256(json.dumps(ours).encode()).hexdigest()[:32]


def _parse_json(text: str) -> dict[str, Any]:
    """A JSON object of bounded size and depth in which no key comes twice."""
    excess = _excess(text)
    if excess:
        raise ValueError(f"{excess} of JSON, more than any plan has")
    content = json.loads(text, object_pairs_hook=_without_duplicates)
    if not isinstance(content, dict) or _is_deeper(content, _MAX_DEPTH):
        raise ValueError(f"no JSON object, or one of more than {_MAX_DEPTH} levels")
    return content


def _excess(text: str) -> str | None:
    """What makes JSON long to parse or large in memory: an empty list takes 3 characters, and then 64 bytes."""
    limits = {
        "characters": (len(text), _MAX_TEXT_LENGTH),
        "values": (text.count(","), _MAX_VALUES),
        "containers": (text.count("[") + text.count("{"), _MAX_CONTAINERS),
    }
    return next((f"{n} {what} (at most {most})" for what, (n, most) in limits.items() if n > most), None)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key that comes twice")
    return content


def _is_deeper(value: object, depth: int) -> bool:
    """Whether containers are nested more than ``depth`` levels deep."""
    level = [value]
    for _ in range(depth):
        containers = [part for part in level if isinstance(part, dict | list | tuple)]
        level = [child for part in containers for child in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return False
    return any(isinstance(part, dict | list | tuple) for part in level)
