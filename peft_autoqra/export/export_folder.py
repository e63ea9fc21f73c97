"""The folder an export is written to: it appears as a whole, and replaces nothing but an earlier export."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from peft_autoqra.errors import ExportError

MARKER_FILE = "autoqra_export.json"
"""Says what kind of export a folder is and lists its files, so that the next one may take its place."""

ExportFormat = Literal["plain-lora", "merged", "base", "gguf"]


@contextmanager
def export_folder(output_dir: str | Path, export_format: ExportFormat) -> Iterator[Path]:
    """A new folder beside ``output_dir``, moved there when all went well and removed when not.

    Args:
        output_dir: where the export shall be.
        export_format: what will be in it.

    Yields:
        The folder to write to.

    Raises:
        ExportError: ``output_dir`` holds something that is not an earlier export, or cannot be replaced.
    """
    directory = Path(output_dir).resolve()
    _check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        yield new
        _write_marker(new, export_format)
        _check_replaceable(directory)  # again: much may have happened since
        if directory.exists():
            directory.rename(old)
        new.rename(directory)


def _write_marker(folder: Path, export_format: ExportFormat) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = json.dumps({"format": export_format, "files": files}, indent=2)
    (folder / MARKER_FILE).write_text(text + "\n", encoding="utf-8")


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; name a folder to write to.")
    if directory.is_mount():
        raise ExportError(f"{directory} is a mount point, which cannot be replaced as a whole; name a folder in it.")
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    foreign = sorted(found - _exported_files(directory))
    if foreign:
        raise ExportError(
            f"{directory} holds files that no earlier export wrote, such as {foreign[0]!r}; name a new or empty "
            "folder."
        )


def _exported_files(directory: Path) -> set[str]:
    try:
        return {MARKER_FILE, *json.loads((directory / MARKER_FILE).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, TypeError, KeyError):  # none there, or not ours
        return set()
