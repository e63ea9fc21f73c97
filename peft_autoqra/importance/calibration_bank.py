"""All that one calibration of a model gives: error table, fit weights and initial adapters, for every bit-width."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_autoqra.errors import CalibrationError, InvalidPlanError
from peft_autoqra.fingerprint import fingerprint_weights
from peft_autoqra.importance.calibration import calibrate, linear_weights
from peft_autoqra.importance.error_table import ErrorTable, ErrorTableSettings, Quantize, build_error_table
from peft_autoqra.plan import DENSE_BITS, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import CALIBRATION_FILE, Correction, PlanCalibration
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.quantized_weight import fit_group_size

FORMAT_VERSION = 1
"""Raised when the same data would give other statistics, corrections or codes, so that old caches are not used."""

_TABLE_FILE = "error_table.safetensors"


@dataclass(frozen=True, eq=False)
class CalibrationBank:
    """Calibration results of a model for all bit-widths of a search.

    Attributes:
        error_table: estimated loss rise of every (module, bits, rank).
        calibrations: bits to the fit weights and the corrections of the largest rank, whose first r components are
            the best correction of rank r.
    """

    error_table: ErrorTable
    calibrations: Mapping[int, PlanCalibration]

    def for_layers(self, layers: Mapping[str, LayerPlan]) -> PlanCalibration:
        """What a plan with these layers has to carry: corrections cut to its ranks.

        Raises:
            InvalidPlanError: a module, bit-width or rank that was not calibrated.
        """
        moments, corrections = {}, {}
        for name, layer in layers.items():
            if layer.bits == DENSE_BITS:
                continue
            calibration = self.calibrations.get(layer.bits)
            if calibration is None or name not in calibration.input_second_moments:
                raise InvalidPlanError(
                    f"{name!r} was not calibrated at {layer.bits} bits; calibrate it with the others."
                )
            moments[name] = calibration.input_second_moments[name]
            if layer.rank:
                corrections[name] = cut_correction(calibration.corrections[name], layer.rank, name)
        return PlanCalibration(input_second_moments=moments, corrections=corrections)

    def save(self, directory: Path) -> None:
        """Write the table and one folder a bit-width; the whole bank appears at once or not at all."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as partial:
            for bits, calibration in self.calibrations.items():
                folder = Path(partial) / "bank" / f"{bits}bit"
                folder.mkdir(parents=True)
                calibration.save(folder)
            (Path(partial) / "bank").mkdir(exist_ok=True)
            self.error_table.save(Path(partial) / "bank" / _TABLE_FILE)
            shutil.rmtree(directory, ignore_errors=True)
            (Path(partial) / "bank").replace(directory)

    @classmethod
    def load(cls, directory: Path, settings: ErrorTableSettings) -> CalibrationBank | None:
        """Read a bank made with these settings; None where there is none, a damaged one or one of other settings."""
        try:
            table = ErrorTable.load(directory / _TABLE_FILE, settings)
            calibrations = {
                bits: PlanCalibration.load(directory / f"{bits}bit" / CALIBRATION_FILE)
                for bits in settings.bit_choices
            }
        except (CalibrationError, InvalidPlanError, OSError):
            return None
        return cls(table, calibrations)


def cut_correction(correction: Correction, rank: int, name: str) -> Correction:
    """The best correction of a smaller rank: the first components.

    Raises:
        InvalidPlanError: the correction has fewer.
    """
    if rank > correction.rank:
        raise InvalidPlanError(f"Rank {rank} of {name!r} is above the calibrated {correction.rank}; calibrate higher.")
    return Correction(left=correction.left[:, :rank], right=correction.right[:rank])


def bank_settings(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    module_names: list[str],
    quantizer: QuantizerSettings,
    bit_choices: Iterable[int],
    max_rank: int,
) -> ErrorTableSettings:
    """Settings whose fingerprint names all that a bank depends on."""
    bit_choices = tuple(sorted(set(bit_choices)))
    digest = hashlib.sha256(fingerprint_weights(linear_weights(model, module_names)).encode())
    for batch in batches:
        for key, value in sorted(batch.items()):
            content = repr(value.tolist() if isinstance(value, Tensor) else value)
            digest.update(f"{key}:{content}".encode())
    digest.update(json.dumps([FORMAT_VERSION, asdict(quantizer), str(model.dtype), bit_choices, max_rank]).encode())
    return ErrorTableSettings(bit_choices=bit_choices, max_rank=max_rank, fingerprint=digest.hexdigest()[:32])


def build_calibration_bank(
    model: PreTrainedModel,
    batches: list[Mapping[str, Tensor]],
    module_names: list[str],
    quantizer: QuantizerSettings,
    settings: ErrorTableSettings,
    *,
    show_progress: bool = False,
) -> CalibrationBank:
    """Calibrate, quantize every module at every bit-width, and decompose the errors.

    Args:
        model: unquantized causal language model.
        batches: tokenized calibration batches, see :func:`calibrate`.
        module_names: the modules to be planned.
        quantizer: of the plans to come; the native backend.
        settings: from :func:`bank_settings`.
        show_progress: show progress bars.

    Raises:
        CalibrationError: empty data, a module that the data never reaches, values that are not finite.
    """
    statistics = calibrate(
        model, tqdm(batches, "calibrating", disable=not show_progress), module_names, fingerprint=settings.fingerprint
    )
    moments = {name: statistics[name].input_second_moment.numpy() for name in module_names}
    corrections: dict[int, dict[str, Correction]] = {bits: {} for bits in settings.bit_choices}

    def keep(name: str, bits: int, left: Tensor, right: Tensor) -> None:
        corrections[bits][name] = Correction(left=to_float16(left), right=to_float16(right))

    weights = tqdm(
        linear_weights(model, module_names), "scoring bits and ranks", len(module_names), disable=not show_progress
    )
    with torch.no_grad():
        table = build_error_table(weights, statistics, affine_quantizer(quantizer), settings, on_correction=keep)
    calibrations = {
        bits: PlanCalibration(input_second_moments=moments, corrections=corrections[bits])
        for bits in settings.bit_choices
    }
    return CalibrationBank(table, calibrations)


def affine_quantizer(settings: QuantizerSettings) -> Quantize:
    """The native quantizer as an error table takes it."""

    def quantize(weight: Tensor, bits: int, moment: Tensor) -> Tensor:
        group_size = fit_group_size(settings.group_size, weight.shape[1], "weight")
        return quantize_affine(weight, bits=bits, group_size=group_size, input_second_moment=moment).dequantize()

    return quantize


def to_float16(tensor: Tensor) -> npt.NDArray[np.float16]:
    """As a plan stores it."""
    return tensor.cpu().numpy().astype(np.float16)
