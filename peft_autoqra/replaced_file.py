"""Files that take the place of what was there as a whole, or not at all: after a kill, and on a full disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from peft_autoqra.errors import AutoQRAError, StorageError


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A file beside its place to write to; it is moved there at the end of the block, and removed if that fails.

    It has one name for all processes, so that what a killed one leaves is overwritten by the next.

    Args:
        path: of the file; its folder is there.

    Raises:
        StorageError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    with stored(path):
        partial.unlink(missing_ok=True)  # a link would be written through
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def replaced_contents(folder: Path) -> Iterator[Path]:
    """A folder inside of another one; its contents replace those of the same name there at the end of the block.

    Args:
        folder: made where missing. Its README.md is there in the new one too, for those that add to it.

    Raises:
        StorageError: something cannot be written; then nothing is replaced.
    """
    new = folder / "saving.partial"
    with stored(folder):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            if (folder / _README).is_file():
                shutil.copy(folder / _README, new)
            yield new
            for path in sorted(new.iterdir()):
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def stored(path: Path) -> Iterator[None]:
    """Name the file or folder that a block writes to where the disk does not take it.

    Raises:
        StorageError: it does not.
    """  # noqa: DOC501 - what is raised again is of others
    try:
        yield
    except AutoQRAError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_WRITER):
            raise
        raise StorageError(
            f"{path} cannot be written ({' '.join(str(error).split())[:200]}); free disk space or check permissions, "
            "and start the same again."
        ) from error


_README = "README.md"
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error")
"""Of the messages of ``torch.save``, which has no error of its own for a disk that is full."""
