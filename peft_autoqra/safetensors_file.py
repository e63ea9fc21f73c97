"""Opening safetensors files that may be broken or come from strangers."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_MODULES

MAX_HEADER_BYTES = 2**26
"""An adapter, a shard or a calibration of 50,000 modules takes some 30 MB; safetensors itself would read 100."""

MAX_TENSORS = 6 * MAX_MODULES
"""Up to six a module, in a calibration with codes and corrections."""

_MAX_COMMAS = 2**21
"""In a header. Some five a tensor and five a module of a plan; parsing 20 million takes a gigabyte."""

_CHUNK_BYTES = 2**20
_SPARSE_BYTES = 2**30
_SPARSE_SHARE = 16


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
        raise InvalidPlanError(
            f"{path} is none of ours: it holds {len(keys)} tensors, the most that is read is {MAX_TENSORS}; save or "
            "download it again."
        )
    slices = {key: file.get_slice(key) for key in keys}
    return {key: TensorEntry(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


def check_can_be_read(path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> None:
    """Refuse to write a file that :func:`open_safetensors` would refuse to read.

    Args:
        path: of the file to be, for messages.
        shapes: tensor name to sizes.
        metadata: of the header.

    Raises:
        InvalidPlanError: too many tensors, or too large a header.
    """
    offset = 10**12  # at least as long as any that is written
    entries = {n: {"dtype": "F8_E4M3", "shape": [*s], "data_offsets": [offset, offset]} for n, s in shapes.items()}
    header = json.dumps({"__metadata__": dict(metadata)} | entries, separators=(",", ":"))
    found = {"tensors": len(shapes), "bytes of header": len(header), "commas in its header": header.count(",")}
    allowed = {"tensors": MAX_TENSORS, "bytes of header": MAX_HEADER_BYTES, "commas in its header": _MAX_COMMAS}
    for what, most in allowed.items():
        if found[what] > most:
            raise InvalidPlanError(
                f"{path} would hold {found[what]} {what}, the most that can be read again is {most}; plan fewer "
                "modules, or keep less beside them."
            )


def _check_regular(path: Path) -> None:
    """A pipe or a device would keep the reader waiting for ever, and a hole of terabytes claims any size."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InvalidPlanError(f"{path} is no regular file; put the plan's or adapter's own file there.")
    stored = 512 * getattr(status, "st_blocks", 0)  # 0: not known here
    if status.st_size > _SPARSE_BYTES and 0 < stored < status.st_size // _SPARSE_SHARE:
        raise InvalidPlanError(
            f"{path} is damaged: of its {status.st_size} bytes only {stored} are stored; save or download it again."
        )
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise InvalidPlanError(
                f"{path} is damaged or none of ours: it claims a header of {num_bytes} bytes, the most that is read "
                f"is {MAX_HEADER_BYTES}; save or download it again."
            )
        chunks = (file.read(min(_CHUNK_BYTES, num_bytes - at)) for at in range(0, num_bytes, _CHUNK_BYTES))
        num_commas = sum(chunk.count(b",") for chunk in chunks)
    if num_commas > _MAX_COMMAS:
        raise InvalidPlanError(
            f"{path} is damaged or none of ours: its header has {num_commas} commas, the most that is read is "
            f"{_MAX_COMMAS}; save or download it again."
        )
