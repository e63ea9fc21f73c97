"""What runs in an actor of a Ray cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_autoqra.errors import ExecutorError, MissingDependencyError
from peft_autoqra.executors.worker import TrialWorker, WorkerSettings
from peft_autoqra.executors.worker_files import WorkerFiles


class RayTrialWorker:
    """What runs in an actor; made without work, so that errors of loading are told from a process that died."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._worker: TrialWorker | None = None

    def prepare(self, files: WorkerFiles, shipped: Mapping[str, Any], num_threads: int, gpu_share: float) -> None:
        """Load model and calibration.

        Args:
            files: of the search.
            shipped: references to their contents by place, for nodes that do not see the files; empty where none
                needs them.
            num_threads: of computations on the CPU.
            gpu_share: of one GPU that is this worker's; 0 for none.

        Raises:
            ExecutorError: as :class:`TrialWorker`.
        """
        share = gpu_share or num_threads / (os.cpu_count() or 1)
        # Ray hides GPUs from those only that asked for some others
        settings = WorkerSettings(num_threads, memory_share=min(share, 1.0), use_cpu=not gpu_share)
        if not shipped or (files.folder.is_dir() and files.bank.is_dir()):
            self._worker = TrialWorker(files, settings)
            return
        ray = import_ray()
        with tempfile.TemporaryDirectory(prefix="autoqra-worker-") as directory:  # mapped files outlive their names
            for name, reference in shipped.items():
                path = Path(directory, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                ray.get(reference).tofile(path)
            self._worker = TrialWorker(WorkerFiles.below(Path(directory)), settings)

    def evaluate(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`TrialWorker.evaluate`.

        Raises:
            ExecutorError: it is not prepared.
        """
        if self._worker is None:
            raise ExecutorError("The worker is not prepared.")
        return self._worker.evaluate(record)


def import_ray() -> Any:
    """The module, which is an extra.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingDependencyError("Ray is not installed: pip install 'peft-autoqra[ray]'.") from error
    return ray
