"""What calibration leaves in a plan: how to quantize each module again and where its adapter starts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError

CALIBRATION_FILE = "autoqra_calibration.safetensors"
ADAPTER_CALIBRATION_FILE = "autoqra_adapter_calibration.safetensors"  # its own, so a plan may lie beside an adapter

_MOMENT = "input_second_moment"
_LEFT = "correction_left"
_RIGHT = "correction_right"
_CODES = ("codes", "scale_codes", "scale_base")
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
        """Write a file into an existing directory."""
        tensors = self._tensors()
        save_file(tensors, directory / filename, metadata={"format": "np", _CHECKSUM: _checksum(tensors)})

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
    def load(cls, path: Path, digest: str | None = None) -> PlanCalibration:
        """Read a file that :meth:`save` wrote.

        Args:
            path: of the file.
            digest: as the plan or adapter notes it.

        Raises:
            InvalidPlanError: the file is damaged or holds something else.
            PlanMismatchError: it has another digest.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
        except SafetensorError as error:
            raise InvalidPlanError(f"{path} is damaged ({error}); save or download it again.") from error
        by_kind: dict[str, dict[str, npt.NDArray[np.generic]]] = {
            kind: {} for kind in (_MOMENT, _LEFT, _RIGHT, *_CODES)
        }
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            if kind not in by_kind or not name:
                raise InvalidPlanError(f"{path} holds the unknown tensor {key!r}; it is no AutoQRA calibration file.")
            by_kind[kind][name] = tensor
        if by_kind[_LEFT].keys() != by_kind[_RIGHT].keys() or len({frozenset(by_kind[kind]) for kind in _CODES}) > 1:
            raise InvalidPlanError(f"{path} holds parts of some corrections or codes only; save or download it again.")
        if metadata.get(_CHECKSUM) != _checksum(tensors):
            raise InvalidPlanError(f"{path} is damaged (wrong checksum); save or download it again.")
        if digest not in (None, metadata[_CHECKSUM]):
            raise PlanMismatchError(
                f"{path} belongs to another plan or adapter than the one beside it; copy the right {path.name} there, "
                "or save or download plan or adapter again."
            )
        return cls(
            input_second_moments=by_kind[_MOMENT],  # type: ignore[arg-type]
            corrections={
                name: Correction(left=left, right=by_kind[_RIGHT][name])  # type: ignore[arg-type]
                for name, left in by_kind[_LEFT].items()
            },
            codes={
                name: StoredCodes(**{kind: by_kind[kind][name] for kind in _CODES})  # type: ignore[arg-type]
                for name in by_kind["codes"]
            },
        )


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
