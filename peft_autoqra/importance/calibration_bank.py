"""All that calibrating a model gives: error table, quantized weights and initial adapters, at every bit-width."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_autoqra.errors import CalibrationError, InvalidPlanError
from peft_autoqra.importance.bank_store import BankEntry, BankStore
from peft_autoqra.importance.calibration import (
    CalibrationOptions,
    calibrate,
    calibration_fingerprint,
    linear_weights,
)
from peft_autoqra.importance.error_table import ErrorTable
from peft_autoqra.importance.module_fit import CalibratedModule, FitSettings, ModuleFit, calibrated_modules
from peft_autoqra.importance.whole_file import one_at_a_time
from peft_autoqra.plan import DENSE_BITS, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import Correction, PlanCalibration
from peft_autoqra.quant.backends import calibrated_backend
from peft_autoqra.terminal_bar import terminal_bar

FORMAT_VERSION = 3
"""Raised when the same data would give other corrections or codes, so that old caches are not used."""


@dataclass(frozen=True, kw_only=True)
class BankSettings:
    """What a bank is made of.

    Attributes:
        module_names: the modules to be planned.
        bit_choices: bit-widths of the plans; 16 may be among them and costs nothing.
        quantizer: of the plans; a backend that takes a calibration.
        fit: largest rank, and the metric.

    Raises:
        CalibrationError: no bit-widths.
    """

    module_names: tuple[str, ...]
    bit_choices: tuple[int, ...]
    quantizer: QuantizerSettings
    fit: FitSettings

    def __post_init__(self) -> None:
        """Check; drop the bit-width that needs no measuring."""
        if not self.bit_choices:
            raise CalibrationError("A calibration needs bit-widths to measure; give bit_choices.")
        object.__setattr__(self, "bit_choices", tuple(sorted({*self.bit_choices} - {DENSE_BITS})))

    def fingerprint(self, statistics_fingerprint: str) -> str:
        """Hash of all that an entry depends on; a bit-width may be added to a bank that is there."""
        content = [FORMAT_VERSION, statistics_fingerprint, asdict(self.quantizer), asdict(self.fit)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class CalibrationBank:
    """Calibration results of a model for all bit-widths of a search.

    Attributes:
        settings: modules, bit-widths and quantizer.
        fingerprint: names model, data and settings.
        entries: (module name, bits) to what was found; on disk and mapped where the bank has a directory.
    """

    settings: BankSettings
    fingerprint: str
    entries: Mapping[tuple[str, int], BankEntry]

    @cached_property
    def error_table(self) -> ErrorTable:
        """Estimated loss rise of every (module, bits, rank)."""
        names, bit_choices = self.settings.module_names, self.settings.bit_choices
        shape = (len(names), len(bit_choices), self.settings.fit.max_rank + 1)
        rises = np.zeros(shape)
        for i, name in enumerate(names):
            for j, bits in enumerate(bit_choices):
                rises[i, j] = self.entries[name, bits].rises
        return ErrorTable(names, bit_choices, rises, self.fingerprint)

    def entry(self, name: str, bits: int) -> BankEntry:
        """One module at one bit-width.

        Raises:
            InvalidPlanError: it was not calibrated.
        """
        try:
            return self.entries[name, bits]
        except KeyError:
            raise InvalidPlanError(
                f"{name!r} was not calibrated at {bits} bits; calibrate it with the others."
            ) from None

    def for_layers(self, layers: Mapping[str, LayerPlan]) -> PlanCalibration:
        """What a plan with these layers has to carry: corrections cut to its ranks.

        Raises:
            InvalidPlanError: a module, bit-width or rank that was not calibrated.
        """
        moments, corrections, codes = {}, {}, {}
        keeps_codes = calibrated_backend(self.settings.quantizer).keeps_codes
        for name, layer in layers.items():
            if layer.bits == DENSE_BITS:
                continue
            entry = self.entry(name, layer.bits)
            if keeps_codes:
                codes[name] = entry.codes
            else:
                moments[name] = entry.input_second_moment
            if layer.rank:
                corrections[name] = cut_correction(entry.correction, layer.rank, name)
        return PlanCalibration(input_second_moments=moments, corrections=corrections, codes=codes)


def cut_correction(correction: Correction, rank: int, name: str) -> Correction:
    """The best correction of a smaller rank: the first components.

    Raises:
        InvalidPlanError: the correction has fewer.
    """
    if rank > correction.rank:
        raise InvalidPlanError(f"Rank {rank} of {name!r} is above the calibrated {correction.rank}; calibrate higher.")
    return Correction(left=correction.left[:, :rank], right=correction.right[:rank])


def build_calibration_bank(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    settings: BankSettings,
    *,
    directory: Path | None = None,
    statistics_fingerprint: str | None = None,
    show_progress: bool = False,
) -> CalibrationBank:
    """Calibrate, quantize every module at every bit-width, and decompose the errors.

    Args:
        model: unquantized causal language model.
        batches: tokenized calibration batches, see :func:`calibrate`.
        settings: what to make.
        directory: where statistics and entries are kept. What is there already is not made again, so a build that was
            stopped goes on, and other bit-widths or quantizers need no second calibration. None keeps all in memory.
        statistics_fingerprint: from :func:`calibration_fingerprint`, where it is known; it reads the whole model.
        show_progress: show progress bars.

    Raises:
        InvalidPlanError: the quantizer takes no calibration.
        CalibrationError: empty data, a module that the data never reaches, values that are not finite.
    """
    batches = list(batches)
    options = CalibrationOptions(directory=directory, show_progress=show_progress)
    names = settings.module_names
    statistics_fingerprint = statistics_fingerprint or calibration_fingerprint(model, batches, names, options)
    fingerprint = settings.fingerprint(statistics_fingerprint)
    folder = None if directory is None else bank_folder(directory, fingerprint)
    store = BankStore(folder)
    with one_at_a_time(folder):
        found = {(name, bits): store.get(name, bits) for name in names for bits in settings.bit_choices}
        missing: dict[str, list[int]] = {}
        for (name, bits), entry in found.items():
            if entry is None:
                missing.setdefault(name, []).append(bits)
        if missing:
            statistics = calibrate(model, batches, names, options, fingerprint=statistics_fingerprint)
            modules = calibrated_modules(linear_weights(model, missing), statistics)
            for module in terminal_bar(modules, "scoring bits and ranks", len(missing), show=show_progress):
                _fit_module(module, missing[module.name], settings, store)
    entries = {key: entry or store.get(*key) for key, entry in found.items()}
    return CalibrationBank(settings, fingerprint, {key: entry for key, entry in entries.items() if entry is not None})


def bank_folder(directory: Path, fingerprint: str) -> Path:
    """Where a bank lies among what is kept of calibrations."""
    return directory / f"bank-{fingerprint}"


def open_calibration_bank(settings: BankSettings, fingerprint: str, folder: Path) -> CalibrationBank:
    """A bank that another process has built; nothing is measured.

    Raises:
        CalibrationError: an entry is missing or damaged.
    """
    store = BankStore(folder)
    entries: dict[tuple[str, int], BankEntry] = {}
    for name in settings.module_names:
        for bits in settings.bit_choices:
            entry = store.get(name, bits)
            if entry is None:
                raise CalibrationError(
                    f"{folder} holds no calibration of {name!r} at {bits} bits; start the search again, which "
                    "calibrates what is missing."
                )
            entries[name, bits] = entry
    return CalibrationBank(settings, fingerprint, entries)


@torch.no_grad()
def _fit_module(module: CalibratedModule, bit_choices: list[int], settings: BankSettings, store: BankStore) -> None:
    quantize = calibrated_backend(settings.quantizer).fit
    for bits in bit_choices:
        store.put(module.name, bits, bank_entry(module, module.fit(quantize, bits, settings.fit)))


def bank_entry(module: CalibratedModule, fit: ModuleFit) -> BankEntry:
    """A fit on the CPU, its correction as a plan stores it.

    Raises:
        CalibrationError: the correction holds values that float16 cannot.
    """
    correction = Correction(left=_to_float16(fit.left), right=_to_float16(fit.right))
    moment = module.statistics.input_second_moment.cpu().numpy()
    return BankEntry(fit.weight.to("cpu"), correction, fit.rises.numpy(), moment)


def _to_float16(tensor: Tensor) -> npt.NDArray[np.float16]:
    half = tensor.to("cpu", torch.float16)
    if not torch.isfinite(half).all():
        raise CalibrationError(
            f"The correction of a quantization error holds values up to {float(tensor.abs().max()):.3g}, more than "
            "float16 can; keep the layers with such weights at 16 bits, or exclude them."
        )
    return half.numpy()
