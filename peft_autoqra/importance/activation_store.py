"""Lists of activations under a name: in memory, or in files that outlive the process."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


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
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = self._path(name).with_suffix(".partial")
        save_file({f"{index:08d}": tensor.contiguous() for index, tensor in enumerate(on_cpu)}, partial)
        partial.replace(self._path(name))

    def get(self, name: str) -> list[Tensor]:
        """The tensors of a name; those on disk are mapped and read when they are used."""
        if self._directory is None:
            return self._lists[name]
        with safe_open(self._path(name), framework="pt") as file:
            return [file.get_tensor(key) for key in sorted(file.keys())]

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
