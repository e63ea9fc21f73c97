"""Which files belong to a folder: links may lead anywhere on the machine."""

from __future__ import annotations

from pathlib import Path

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def belongs_to(folder: Path, name: str | Path) -> bool:
    """Whether a file lies in a folder once every link is followed.

    A snapshot in the hub's cache consists of links into the ``blobs`` of the same repository; those belong to it.

    Args:
        folder: that may be reached by links itself.
        name: relative to the folder; the file need not exist.
    """
    root = folder.resolve()
    try:
        target = (root / name).resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    is_blob = root.parent.name == _SNAPSHOTS and target.parent == root.parent.parent / _BLOBS
    return target.is_relative_to(root) or is_blob
