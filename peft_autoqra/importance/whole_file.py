"""Folders that several processes may share: files appear as a whole, and one process writes at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peft_autoqra.errors import CalibrationError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside its place, then move it there; the folder is made where it is missing.

    Args:
        path: of the file.
        tensors: contiguous, on the CPU.
        metadata: for its header.

    Raises:
        CalibrationError: it cannot be written, for example because the disk is full.
    """
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CalibrationError(
            f"{path} cannot be written ({error}); free disk space, or name another folder (cache_dir). What was "
            "written before is kept."
        ) from error


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
