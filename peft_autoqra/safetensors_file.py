"""Opening safetensors files that may be broken or come from strangers."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peft_autoqra.errors import InvalidPlanError

MAX_HEADER_BYTES = 2**24
"""A plan or adapter of 30,000 modules takes less; safetensors itself would read 100 MB and take 400 for it."""

MAX_TENSORS = 2**17
"""Up to six a module."""


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor.

    Attributes:
        dtype: as safetensors writes it, such as ``"F32"``.
        shape: sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """For messages."""
        return f"{self.dtype} {list(self.shape)}"


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a file for NumPy; nothing but its header is read. What fails inside the block is reported likewise.

    Raises:
        InvalidPlanError: no regular file, unreadable, damaged, or its header is larger than any of ours.
    """
    try:
        _check_regular(path)
        with safe_open(path, framework="np") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InvalidPlanError(
            f"{path} is damaged or cannot be read ({error}); check its permissions, or save or download it again."
        ) from error


def tensor_entries(file: Any, path: Path) -> dict[str, TensorEntry]:
    """Every tensor of an open file, unread.

    Args:
        file: that :func:`open_safetensors` gave.
        path: of it, for messages.

    Raises:
        InvalidPlanError: there are more than in any file of ours.
    """
    keys = file.keys()
    if len(keys) > MAX_TENSORS:
        raise InvalidPlanError(f"{path} is none of ours: it holds {len(keys)} tensors; save or download it again.")
    slices = {key: file.get_slice(key) for key in keys}
    return {key: TensorEntry(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


def _check_regular(path: Path) -> None:
    """A pipe or a device would keep the reader waiting for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise InvalidPlanError(f"{path} is no regular file; put the plan's or adapter's own file there.")
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > MAX_HEADER_BYTES:
        raise InvalidPlanError(
            f"{path} is damaged or none of ours: it claims a header of {num_bytes} bytes, the most that is read is "
            f"{MAX_HEADER_BYTES}; save or download it again."
        )
