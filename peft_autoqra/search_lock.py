"""One search at a time in a directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peft_autoqra.errors import SearchStateError

LOCK_FILE = "search.lock"


@contextmanager
def search_lock(directory: Path) -> Iterator[None]:
    """Keep other searches out of a directory, from this process too; it is made where missing.

    The operating system holds the lock for the process and takes it back when the process ends, however it ends; the
    empty file stays and means nothing by itself.

    Args:
        directory: of the search.

    Raises:
        SearchStateError: another search holds the lock, or the directory cannot be written to.
    """
    lock = FileLock(directory / LOCK_FILE, blocking=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise SearchStateError(
            f"Another search is running in {directory}; wait for it, stop it, or use another output_dir. Its lock "
            "vanishes with that search's process, also when it is killed."
        ) from error
    except OSError as error:
        raise SearchStateError(f"{directory} cannot be written to ({error}); use another output_dir.") from error
    try:
        yield
    finally:
        lock.release()
