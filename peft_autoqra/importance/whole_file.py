"""Folders that several processes may share: files appear as a whole, with a checksum; one process writes at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_autoqra.errors import CalibrationError, StorageError
from peft_autoqra.replaced_file import replaced_file

_CHECKSUM = "autoqra_checksum"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside its place, then move it there; the folder is made where it is missing.

    Args:
        path: of the file.
        tensors: contiguous, on the CPU.
        metadata: for its header.

    Raises:
        CalibrationError: it cannot be written, for example because the disk is full.
    """
    known = dict(metadata or {})
    known[_CHECKSUM] = _checksum(tensors, known)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as partial:
            save_file(dict(tensors), partial, metadata=known)
    except OSError as error:
        reason = error.__cause__ if isinstance(error, StorageError) else error
        raise CalibrationError(
            f"{path} cannot be written ({reason}); free disk space, or name another folder (cache_dir). What was "
            "written before is kept."
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write_tensors` wrote; the tensors are mapped, and gone through once for the checksum.

    Returns:
        Tensors and metadata.

    Raises:
        CalibrationError: the file is missing, or not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (OSError, SafetensorError, ValueError) as error:
        raise CalibrationError(f"{path} is damaged ({error}).") from error
    if metadata.pop(_CHECKSUM, None) != _checksum(tensors, metadata):
        raise CalibrationError(f"{path} is damaged (wrong checksum).")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@contextmanager
def one_at_a_time(directory: Path | None) -> Iterator[None]:
    """Wait until no other process works on a folder; nothing to wait for without one.

    Raises:
        CalibrationError: the folder cannot be made or written to.
    """
    if directory is None:
        yield
        return
    lock = FileLock(directory.with_name(f"{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise CalibrationError(f"{directory.parent} cannot be written to ({error}); name another folder.") from error
    try:
        yield
    finally:
        lock.release()
