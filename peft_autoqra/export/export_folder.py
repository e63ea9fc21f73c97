"""The folder an export is written to: it appears as a whole, and replaces nothing but an earlier export."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        ExportError: ``output_dir`` holds something that is not an earlier export, or cannot be written or replaced.
    """
    directory = Path(output_dir).resolve()
    check_replaceable(directory)
    temporary = _make_folder_beside(directory)
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        _write_marker(new, export_format)
        check_replaceable(directory)  # again: much may have happened since
        _replace(directory, new, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):  # it holds an earlier export that could not be put back
            temporary.rmdir()


def _make_folder_beside(directory: Path) -> Path:
    """On the same file system, so that renaming moves no bytes."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ExportError(
            f"{directory} cannot be made: {_reason(error)}; name a folder where you may write."
        ) from error


def _replace(directory: Path, new: Path, old: Path) -> None:
    """Move ``new`` to ``directory``; what was there is back in place where that fails."""
    try:
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    except BaseException as error:
        _put_back(directory, old)
        if not isinstance(error, OSError):
            raise
        raise ExportError(
            f"{directory} cannot be replaced: {_reason(error)}; it is as it was. Name a new folder."
        ) from error
    if old.exists():
        shutil.rmtree(old)


def _put_back(directory: Path, old: Path) -> None:
    if not old.exists():
        return
    try:
        old.rename(directory)
    except OSError as error:
        raise ExportError(
            f"{directory} cannot be replaced, nor put back: {_reason(error)}. The earlier export is in {old}."
        ) from error


def _reason(error: OSError) -> str:
    """Without the names of temporary folders, which mean nothing to users."""
    return error.strerror or type(error).__name__


def _write_marker(folder: Path, export_format: ExportFormat) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = json.dumps({"format": export_format, "files": files}, indent=2)
    (folder / MARKER_FILE).write_text(text + "\n", encoding="utf-8")


def check_replaceable(directory: Path) -> None:
    """Whether an export may take a folder's place.

    Raises:
        ExportError: it holds something that is not an earlier export, or cannot be replaced.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; name a folder to write to.")
    if directory.is_mount():
        raise ExportError(f"{directory} is a mount point, which cannot be replaced as a whole; name a folder in it.")
    foreign = sorted(_entries(directory) - _exported_files(directory))
    if foreign:
        raise ExportError(
            f"{directory} holds what no earlier export wrote, such as {foreign[0]!r}; name a new or empty folder."
        )


def _entries(directory: Path) -> set[str]:
    """All that would be lost with the folder: files, links of every kind, and empty folders."""
    return {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def _exported_files(directory: Path) -> set[str]:
    try:
        return {MARKER_FILE, *json.loads((directory / MARKER_FILE).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, TypeError, KeyError):  # none there, or not ours
        return set()
