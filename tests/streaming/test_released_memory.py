"""Pages of a mapped file are given back, and what they hold stays."""

import mmap
import sys
from pathlib import Path

import pytest

from peft_autoqra.streaming.released_memory import ReleasedMemory

NUM_BYTES = 2**22

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident_bytes(path: Path) -> int:
    """Of this process's mappings of the file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def test_unchanged_mappings_of_this_load_only(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"7" * NUM_BYTES)
    earlier = map_file(path)
    earlier[:4] = b"mine"
    memory = ReleasedMemory([path])
    mapped = map_file(path)
    assert mapped[::4096].count(b"7") == NUM_BYTES // 4096
    before = resident_bytes(path)
    memory.note_read(1)
    assert resident_bytes(path) == before
    memory.note_read(2**25)
    assert resident_bytes(path) <= before - NUM_BYTES
    assert mapped[::4096].count(b"7") == NUM_BYTES // 4096
    assert earlier[:4] == b"mine"
    mapped[:4] = b"mine"
    memory.release()
    assert mapped[:4] == b"mine"
    earlier.close()
    mapped.close()


def test_files_that_are_not_mapped_do_not_matter(tmp_path: Path) -> None:
    ReleasedMemory([tmp_path / "nowhere"]).release()
    ReleasedMemory([]).release()
