"""One worker in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peft_autoqra.executors.worker_files import WorkerFiles, read_worker_files
from peft_autoqra.trial import Trial


@dataclass(frozen=True)
class WorkerSettings:
    """How much of its machine a worker uses.

    Attributes:
        num_threads: of its computations on the CPU; another number may round sums differently.
        memory_share: of the free memory of its device.
        use_cpu: leave GPUs alone, whatever the recipe says.
    """

    num_threads: int
    memory_share: float
    use_cpu: bool = False


class TrialWorker:
    """Holds a resident model and its calibration, and evaluates trials as the search's own process would.

    Args:
        files: of the search.
        settings: how much of the machine to use.

    Raises:
        ExecutorError: the files are not seen from here, or cannot be used.
    """

    def __init__(self, files: WorkerFiles, settings: WorkerSettings) -> None:
        """Load."""
        torch.set_num_threads(settings.num_threads)
        setup, bank = read_worker_files(files, use_cpu=settings.use_cpu)
        self._evaluator = setup.evaluator(bank, memory_share=settings.memory_share)

    def evaluate(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Evaluate a trial.

        Args:
            record: from :meth:`Trial.to_dict <peft_autoqra.trial.Trial.to_dict>`.

        Returns:
            The result as :meth:`TrialResult.to_dict <peft_autoqra.trial.TrialResult.to_dict>` gives it.
        """
        trial = Trial.from_dict(record)
        return self._evaluator.evaluate(trial.plan, trial.fidelity).to_dict()


_LOCK = threading.Lock()
_WORKERS: dict[WorkerFiles, TrialWorker] = {}


def evaluate_here(files: WorkerFiles, settings: WorkerSettings, record: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate a trial with this process's worker, which is made first where there is none of that search yet.

    Threads of one process wait for each other, for there is one model.

    Raises:
        ExecutorError: as :class:`TrialWorker`.
    """
    with _LOCK:
        if files not in _WORKERS:
            _WORKERS.clear()  # of another search; its memory is needed
            _WORKERS[files] = TrialWorker(files, settings)
        return _WORKERS[files].evaluate(record)
