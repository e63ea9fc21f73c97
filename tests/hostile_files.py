"""Safetensors files as no library writes them, and a bound on what reading them may allocate."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_raw(
    path: Path, header: bytes | dict[str, Any], data: bytes = b"", *, data_bytes: int = 0, header_bytes: int = -1
) -> None:
    """Write length, header and data as given.

    Args:
        path: of the file.
        header: text, or what is dumped as JSON.
        data: that follows.
        data_bytes: the file ends as if so much followed; a hole where the file system has them.
        header_bytes: the length to claim; the true one by default.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text) if header_bytes < 0 else header_bytes) + text + data)
        if data_bytes:
            file.truncate(8 + len(text) + data_bytes)


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file that is well."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@contextmanager
def little_memory(extra_bytes: int = 2**28) -> Iterator[None]:
    """Let the process allocate no more than this beyond what it holds; Linux only, elsewhere anything goes.

    Files that are mapped do not count.
    """
    if sys.platform != "linux":
        yield
        return
    import resource  # noqa: PLC0415 - Unix only

    status = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * held + extra_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
