"""What a search gives those who evaluate its trials."""

from __future__ import annotations

import shutil
import uuid
from functools import cached_property
from pathlib import Path

import torch

from peft_autoqra.executors.worker_files import WorkerFiles, write_worker_files
from peft_autoqra.importance.calibration_bank import CalibrationBank, bank_folder
from peft_autoqra.search_setup import SearchSetup
from peft_autoqra.trial import Evaluator

_PREFIX = "workers-"


class WorkerSource:
    """The search's own model for one who works in its process; files for workers in others.

    Args:
        setup: model, data and settings.
        bank: calibration.
        cache_dir: where it is kept.
        directory: where files for workers are written; they are removed in the end, with those of searches that were
            killed. It is the search's alone.
    """

    def __init__(self, setup: SearchSetup, bank: CalibrationBank, *, cache_dir: Path, directory: Path) -> None:
        """Nothing is written or loaded yet."""
        self._setup, self._bank, self._cache_dir = setup, bank, cache_dir
        self._directory = directory
        self._is_resident = False
        self._device = next(setup.model.parameters()).device

    @property
    def max_trial_seconds(self) -> float | None:
        """After so long a worker ends a trial by itself; None is no limit."""
        return self._setup.config.max_trial_seconds

    @property
    def weight_bytes(self) -> int:
        """Of the unquantized model."""
        tensors = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self._setup.model.parameters()
        }
        return sum(tensors.values())

    @property
    def needs_gpu(self) -> bool:
        """Whether the search, and so its workers, compute on a GPU."""
        return bool(self._setup.args.device.type == "cuda")

    def evaluator(self) -> Evaluator:
        """Evaluates on the search's own model."""
        self._is_resident = True
        return self._setup.evaluator(self._bank)

    @cached_property
    def files(self) -> WorkerFiles:
        """Written at the first look; then the search's own model leaves the accelerator to the workers.

        Raises:
            ExecutorError: they cannot be written.
        """
        bank = bank_folder(self._cache_dir, self._bank.fingerprint)
        folder = self._directory / f"{_PREFIX}{uuid.uuid4().hex[:12]}"  # seen by a worker it is this one, not its like
        files = write_worker_files(self._setup, self._bank, folder, bank)
        if self._device.type != "cpu":
            self._setup.model.to("cpu")
            torch.accelerator.empty_cache()
        return files

    def close(self) -> None:
        """Put the model back as it was, and remove the files; workers that have mapped them still can read."""
        if self._is_resident:
            self._setup.resident.restore()
        if self._device.type != "cpu":
            self._setup.model.to(self._device)
        for folder in self._directory.glob(f"{_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)
