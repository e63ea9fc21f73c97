"""All that evaluates trials, as files: a search writes them once, workers in other processes map them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_from_disk

from peft_autoqra.errors import ExecutorError
from peft_autoqra.evaluation.objective import Objective
from peft_autoqra.importance.calibration_bank import CalibrationBank, open_calibration_bank
from peft_autoqra.search_setup import SearchSetup

PACKAGES = ("peft-autoqra", "torch", "transformers", "peft", "trl")
"""Of another version the same trial may give another loss, or none."""

_SETUP, _VERSIONS, _SPLITS = "setup.pt", "versions.json", ("train", "held_out", "given")
_IN_A_MODULE = (
    "define functions and classes that the search uses in a module that every worker can import, not in the main "
    "script or in a function"
)


class WorkerFilesNotSeenError(ExecutorError):
    """A worker on a machine that does not share the search's folders."""


@dataclass(frozen=True)
class WorkerFiles:
    """Where a worker finds what it needs.

    Attributes:
        folder: model, prepared data and settings.
        bank: calibration.
    """

    folder: Path
    bank: Path

    def all(self) -> dict[str, Path]:
        """Every file, by its place below a folder that holds both; :meth:`below` finds them there."""
        return {
            f"{place}/{path.relative_to(folder).as_posix()}": path
            for place, folder in (("folder", self.folder), ("bank", self.bank))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    @classmethod
    def below(cls, directory: Path) -> WorkerFiles:
        """Of copies that were laid where :meth:`all` says."""
        return cls(directory / "folder", directory / "bank")


def write_worker_files(setup: SearchSetup, bank: CalibrationBank, folder: Path, bank_folder: Path) -> WorkerFiles:
    """Write model, prepared data and settings.

    Args:
        setup: of the search; its model has its own weights.
        bank: calibration, with its entries on disk.
        folder: to be filled; made where missing.
        bank_folder: where the bank lies.

    Raises:
        ExecutorError: they cannot be written, or hold what cannot be pickled.
    """
    sent, data = copy.copy(setup), copy.copy(setup.data)
    vars(sent).pop("resident", None)
    sent.data = data
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _no_progress_bars():
            for split in _SPLITS:  # rows may lie in a cache that other machines do not have
                getattr(data, split).save_to_disk(folder / split)
                setattr(data, split, None)
        torch.save((sent, bank.settings, bank.fingerprint), folder / _SETUP)
        (folder / _VERSIONS).write_text(json.dumps(_versions()), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise ExecutorError(
            f"What workers need cannot be written to {folder} ({error}); free disk space, or use another output_dir."
        ) from error
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ExecutorError(
            f"Model, data and settings cannot be sent to other processes ({error}); {_IN_A_MODULE}."
        ) from error
    return WorkerFiles(folder.resolve(), bank_folder.resolve())


def check_can_be_sent(objective: Objective | None) -> None:
    """Refuse an objective that :func:`write_worker_files` could not write; costs nothing.

    Raises:
        ExecutorError: it cannot be pickled.
    """
    try:
        pickle.dumps(objective)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ExecutorError(f"The objective cannot be sent to other processes ({error}); {_IN_A_MODULE}.") from error


def read_worker_files(files: WorkerFiles, *, use_cpu: bool = False) -> tuple[SearchSetup, CalibrationBank]:
    """Map what :func:`write_worker_files` wrote; workers on one machine share the memory of what they do not change.

    The model is on the device that the recipe's settings choose in this process.

    Args:
        files: what was written.
        use_cpu: leave GPUs alone, whatever the recipe says.

    Raises:
        WorkerFilesNotSeenError: the files are not there.
        ExecutorError: they are of other versions of the packages, or cannot be read.
        CalibrationError: the bank is incomplete.
    """
    for folder in (files.folder, files.bank):
        if not folder.is_dir():
            raise WorkerFilesNotSeenError(
                f"A worker does not see {folder}, where the search has put what it needs; put output_dir and "
                "cache_dir on a file system that all machines share."
            )
    theirs, ours = json.loads((files.folder / _VERSIONS).read_text(encoding="utf-8")), _versions()
    if theirs != ours:
        changed = ", ".join(f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs != ours)
        raise ExecutorError(f"A worker runs other packages than the search ({changed}); install the same versions.")
    try:
        setup, settings, fingerprint = torch.load(
            files.folder / _SETUP, map_location="cpu", mmap=True, weights_only=False
        )
        for split in _SPLITS:
            setattr(setup.data, split, load_from_disk(files.folder / split))
        vars(setup.args).pop("_setup_devices", None)  # the search's; each process has its own
        setup.args.use_cpu = setup.args.use_cpu or use_cpu
        setup.model.to(setup.args.device)
    except (AttributeError, ImportError) as error:
        raise ExecutorError(f"A worker lacks code of the search ({error}); {_IN_A_MODULE}.") from error
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ExecutorError(f"A worker cannot load the model and its settings: {error}") from error
    return setup, open_calibration_bank(settings, fingerprint, files.bank)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Of datasets, which has one for every file that it writes."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
