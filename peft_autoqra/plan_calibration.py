"""What calibration leaves in a plan: how to quantize each module again and where its adapter starts."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.module_names import check_module_name
from peft_autoqra.replaced_file import replaced_file
from peft_autoqra.safetensors_file import TensorEntry, check_can_be_read, open_safetensors, tensor_entries

CALIBRATION_FILE = "autoqra_calibration.safetensors"
ADAPTER_CALIBRATION_FILE = "autoqra_adapter_calibration.safetensors"  # its own, so a plan may lie beside an adapter

_MOMENT = "input_second_moment"
_LEFT = "correction_left"
_RIGHT = "correction_right"
_CODES = ("codes", "scale_codes", "scale_base")
_FORMATS = {
    _MOMENT: ("F32", (1,)),
    _LEFT: ("F16", (2,)),
    _RIGHT: ("F16", (2,)),
    "codes": ("U8", (1,)),
    "scale_codes": ("U8", (1, 2)),
    "scale_base": ("U8", (1, 3)),
}
"""Type and numbers of dimensions, by kind."""
_CHECKSUM = "autoqra_checksum"


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Low-rank correction of a quantization error: ``W ~ Q + left @ right``.

    Attributes:
        left: ``[out_features, rank]``, float16.
        right: ``[rank, in_features]``, float16.
    """

    left: npt.NDArray[np.float16]
    right: npt.NDArray[np.float16]

    @property
    def rank(self) -> int:
        """Number of columns of ``left``."""
        return int(self.left.shape[1])


@dataclass(frozen=True, kw_only=True)
class StoredCodes:
    """A quantized weight as bytes, for quantizers whose result depends on more than a plan can carry.

    Attributes:
        codes: packed codes, uint8; see ``QuantizedWeight``, which all three are named after.
        scale_codes: codes of scales and offsets, uint8.
        scale_base: what these are relative to, uint8.
    """

    codes: npt.NDArray[np.uint8]
    scale_codes: npt.NDArray[np.uint8]
    scale_base: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ModuleCalibration:
    """What quantizing one module again takes.

    Attributes:
        input_second_moment: ``E[x_j^2]``, ``[in_features]``, float32, or None.
        codes: the quantized weight itself, or None where the quantizer makes it again.
    """

    input_second_moment: npt.NDArray[np.float32] | None = None
    codes: StoredCodes | None = None

    @property
    def digest(self) -> str | None:
        """Hash of what the codes depend on beside the weight; None where that is nothing."""
        if self.codes is not None:
            return _hash(self.codes.codes, self.codes.scale_codes, self.codes.scale_base)
        return None if self.input_second_moment is None else _hash(self.input_second_moment)


@dataclass(frozen=True, kw_only=True)
class PlanCalibration:
    """Calibration results that a plan or adapter carries, so that no one needs the calibration data again.

    Attributes:
        input_second_moments: module name to ``E[x_j^2]`` of its inputs, ``[in_features]``, float32. The quantizer's
            fit is weighted with them; the same values give the same codes.
        corrections: module name to the initial value of its adapter; empty once an adapter is trained.
        codes: module name to its quantized weight, where the quantizer could not make it again.
    """

    input_second_moments: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    codes: Mapping[str, StoredCodes] = field(default_factory=dict)

    def module(self, name: str) -> ModuleCalibration | None:
        """What quantizing one module again takes; None where it was not calibrated."""
        if name not in self.input_second_moments and name not in self.codes:
            return None
        return ModuleCalibration(input_second_moment=self.input_second_moments.get(name), codes=self.codes.get(name))

    def __deepcopy__(self, memo: dict[int, object]) -> PlanCalibration:
        """Itself: nothing changes it."""
        return self

    @property
    def digest(self) -> str:
        """Hash of all values; a plan or adapter notes it, so that the calibration of another is noticed."""
        return _checksum(self._tensors())

    def without_corrections(self) -> PlanCalibration | None:
        """What a trained adapter needs of it: moments and codes; None where there are none."""
        if not self.input_second_moments and not self.codes:
            return None
        return PlanCalibration(input_second_moments=self.input_second_moments, codes=self.codes)

    def save(self, directory: Path, filename: str = CALIBRATION_FILE) -> None:
        """Write a file into an existing directory.

        Raises:
            InvalidPlanError: it is too large to be read again.
            StorageError: the disk does not take it; a file that was there is kept.
        """
        tensors = self._tensors()
        metadata = {"format": "np", _CHECKSUM: _checksum(tensors)}
        check_can_be_read(directory / filename, {key: tensor.shape for key, tensor in tensors.items()}, metadata)
        with replaced_file(directory / filename) as partial:
            save_file(tensors, partial, metadata=metadata)

    def _tensors(self) -> dict[str, npt.NDArray[np.generic]]:
        tensors: dict[str, npt.NDArray[np.generic]] = {
            f"{_MOMENT}:{name}": np.ascontiguousarray(moment) for name, moment in self.input_second_moments.items()
        }
        for name, correction in self.corrections.items():
            tensors[f"{_LEFT}:{name}"] = np.ascontiguousarray(correction.left)
            tensors[f"{_RIGHT}:{name}"] = np.ascontiguousarray(correction.right)
        for name, stored in self.codes.items():
            tensors.update({f"{kind}:{name}": np.ascontiguousarray(getattr(stored, kind)) for kind in _CODES})
        return tensors

    @classmethod
    def load(
        cls, path: Path, digest: str | None = None, shapes: Mapping[str, tuple[int, int]] | None = None
    ) -> PlanCalibration:
        """Read a file that :meth:`save` wrote. Names, types and shapes are checked before any value is read.

        Args:
            path: of the file.
            digest: as the plan or adapter notes it.
            shapes: module name to weight shape, where known: all tensors have to be of these modules, and fit.

        Raises:
            InvalidPlanError: the file is damaged or holds something else.
            PlanMismatchError: it has another digest, or is of modules of other shapes.
        """
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            entries = tensor_entries(file, path)
            _check_entries(path, entries, shapes or {})
            found = metadata.get(_CHECKSUM)
            if found is not None and digest not in (None, found):
                raise PlanMismatchError(
                    f"{path} belongs to another plan or adapter than the one beside it; copy the right {path.name} "
                    "there, or save or download plan or adapter again."
                )
            _check_known(path, entries, shapes or {})
            tensors = {key: file.get_tensor(key) for key in entries}
        if found != _checksum(tensors):
            raise InvalidPlanError(f"{path} is damaged (wrong checksum); save or download it again.")
        _check_values(path, tensors)
        return cls._from_tensors(tensors)

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> PlanCalibration:
        by_kind = _by_kind(tensors)
        return cls(
            input_second_moments=by_kind[_MOMENT],
            corrections={
                name: Correction(left=left, right=by_kind[_RIGHT][name]) for name, left in by_kind[_LEFT].items()
            },
            codes={name: StoredCodes(**{kind: by_kind[kind][name] for kind in _CODES}) for name in by_kind["codes"]},
        )


_Value = TypeVar("_Value")


def _by_kind(tensors: Mapping[str, _Value]) -> dict[str, dict[str, _Value]]:
    """Kind to module name to tensor."""
    by_kind: dict[str, dict[str, _Value]] = {kind: {} for kind in _FORMATS}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        by_kind[kind][name] = tensor
    return by_kind


def _check_entries(path: Path, entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, int]]) -> None:
    for key, entry in entries.items():
        kind, _, name = key.partition(":")
        if kind not in _FORMATS or not name:
            raise InvalidPlanError(
                f"{path} holds the unknown tensor {reprlib.repr(key)}; it is no AutoQRA calibration file."
            )
        check_module_name(name)
        dtype, dimensions = _FORMATS[kind]
        if entry.dtype != dtype or len(entry.shape) not in dimensions:
            raise InvalidPlanError(f"{path} is damaged ({key!r} is {entry}); save or download it again.")
    by_kind = _by_kind(entries)
    if by_kind[_LEFT].keys() != by_kind[_RIGHT].keys() or len({frozenset(by_kind[kind]) for kind in _CODES}) > 1:
        raise InvalidPlanError(f"{path} holds parts of some corrections or codes only; save or download it again.")
    for name, left in by_kind[_LEFT].items():
        if left.shape[1] != by_kind[_RIGHT][name].shape[0]:
            raise InvalidPlanError(f"{path} is damaged (two ranks of {name!r}); save or download it again.")
    for name, shape in shapes.items():
        parts = {kind: by_kind[kind][name].shape for kind in _FORMATS if name in by_kind[kind]}
        if not _fits(parts, *shape):
            raise PlanMismatchError(
                f"{path} holds {parts} for {name!r}, whose weight has shape {shape} in the plan; copy the right "
                f"{path.name} there, or save or download it again."
            )


def _check_known(path: Path, entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Where shapes are given nothing is read of which there is none: it could claim any size."""
    unknown = sorted({key.partition(":")[2] for key in entries} - shapes.keys()) if shapes else []
    if unknown:
        raise PlanMismatchError(
            f"{path} holds tensors of {reprlib.repr(unknown)}, of which the plan gives no shape; copy the right "
            f"{path.name} there, or save or download it again."
        )


def _fits(parts: Mapping[str, tuple[int, ...]], out_features: int, in_features: int) -> bool:
    """Whether tensors of these shapes can belong to a weight of this shape; the quantizer checks codes exactly."""
    num_weights, largest_rank = out_features * in_features, min(out_features, in_features)
    rank = parts.get(_LEFT, (0, 0))[1]
    return (
        parts.get(_MOMENT, (in_features,)) == (in_features,)
        and parts.get(_LEFT, (out_features, rank)) == (out_features, rank)
        and parts.get(_RIGHT, (rank, in_features)) == (rank, in_features)
        and rank <= largest_rank
        and all(math.prod(parts.get(kind, ())) <= num_weights for kind in _CODES)
    )


def _check_values(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise InvalidPlanError(f"{path} holds values of {key!r} that are not finite; calibrate the plan again.")
        if key.startswith(_MOMENT) and (tensor < 0).any():
            raise InvalidPlanError(f"{path} holds negative values of {key!r}; calibrate the plan again.")


def _checksum(tensors: Mapping[str, npt.NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}:{tensor.dtype}:{tensor.shape}:".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()[:32]


def _hash(*arrays: npt.NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
