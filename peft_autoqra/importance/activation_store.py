"""Lists of activations under a name: in memory, or in files that outlive the process."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.whole_file import read_tensors, write_tensors


class ActivationStore:
    """Keeps one list of tensors a name, on the CPU.

    Args:
        directory: made when needed, one safetensors file a name; None keeps everything in memory.
    """

    def __init__(self, directory: Path | None) -> None:
        """Nothing is read or written yet."""
        self._directory = directory
        self._lists: dict[str, list[Tensor]] = {}

    def put(self, name: str, tensors: list[Tensor]) -> None:
        """Keep a list; what is on disk is there as a whole or not at all."""
        on_cpu = [tensor.detach().to("cpu") for tensor in tensors]
        if self._directory is None:
            self._lists[name] = on_cpu
            return
        write_tensors(self._path(name), {f"{index:08d}": tensor.contiguous() for index, tensor in enumerate(on_cpu)})

    def get(self, name: str) -> list[Tensor]:
        """The tensors of a name; those on disk are mapped and read when they are used.

        Raises:
            CalibrationError: the file is missing or damaged; then everything is forgotten.
        """
        if self._directory is None:
            return self._lists[name]
        try:
            return list(read_tensors(self._path(name))[0].values())
        except CalibrationError as error:
            self.clear()
            raise CalibrationError(
                f"{error} The unfinished calibration beside it was given up; run the same again."
            ) from error

    def __contains__(self, name: str) -> bool:
        """Whether a list is kept under this name."""
        return name in self._lists if self._directory is None else self._path(name).exists()

    def drop(self, name: str) -> None:
        """Forget one list, if it is there."""
        self._lists.pop(name, None)
        if self._directory is not None:
            self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        self._lists.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return Path(self._directory or "", f"{name}.safetensors")
