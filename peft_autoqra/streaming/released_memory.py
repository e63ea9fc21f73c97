"""Giving memory back to the system while a checkpoint is read."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

_MADV_DONTNEED = 4
_RELEASE_EVERY_BYTES = 2**20


class ReleasedMemory:
    """Lets go of what was read and freed, as weights are quantized.

    safetensors maps whole files, and the mapping lives as long as one embedding or norm of it does; so every page
    that was read once would count as this process's memory. They are read again from the page cache when needed.
    Mappings from before this load are left alone, and those with a page that was changed, as that would be lost.

    glibc keeps freed weights below 32 MB on its heap, scattered between the small codes that stay; for 214 million
    weights converted to float32 that came to 280 MB.

    Does nothing outside Linux.

    Args:
        files: the checkpoint's; those that are not mapped do not matter.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        """Note the mappings that exist already."""
        self._files = {str(Path(file).resolve()) for file in files}
        self._earlier = set(self._mappings())
        self._read_bytes = 0

    def note_read(self, num_bytes: int) -> None:
        """Release everything each time another MiB was read; doing so takes milliseconds.

        Args:
            num_bytes: of the weight that is not needed any more.
        """
        self._read_bytes += num_bytes
        if self._read_bytes >= _RELEASE_EVERY_BYTES:
            self.release()

    def release(self) -> None:
        """Drop the resident pages of the mapped files, and the heap's free pages."""
        self._read_bytes = 0
        if not sys.platform.startswith("linux"):
            return
        libc = ctypes.CDLL(None)
        for (start, end), changed_kilobytes in self._mappings().items():
            if (start, end) not in self._earlier and not changed_kilobytes:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
        if hasattr(libc, "malloc_trim"):  # musl has none
            libc.malloc_trim(ctypes.c_size_t(0))

    def _mappings(self) -> dict[tuple[int, int], int]:
        """(start, end) of this process's mappings of the files, with their kilobytes of changed pages."""
        if not sys.platform.startswith("linux") or not self._files:
            return {}
        try:
            lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # hardened systems hide it
            return {}
        mappings: dict[tuple[int, int], int] = {}
        current: tuple[int, int] | None = None
        for line in lines:
            fields = line.split(maxsplit=5)
            if not fields[0].endswith(":"):  # start-end, permissions, offset, device, inode, path
                start, end = (int(address, 16) for address in fields[0].split("-"))
                current = (start, end) if fields[5:] and fields[5] in self._files else None
            elif current is not None and fields[0] in ("Anonymous:", "Swap:"):
                mappings[current] = mappings.get(current, 0) + int(fields[1])
        return mappings
