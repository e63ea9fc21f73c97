"""Backends that make native layers: activation-weighted affine, and the same with error feedback."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.plan_calibration import ModuleCalibration, StoredCodes
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.error_feedback import quantize_with_error_feedback
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.packing import NATIVE_BITS
from peft_autoqra.quant.quantized_weight import QuantizedWeight, WeightFormat, fit_group_size


class NativeBackend:
    """The package's own 2, 3, 4 and 8-bit format, fitted by activation-weighted squared error.

    Args:
        settings: their group size is halved per module until it divides the input size.
    """

    keeps_codes = False

    def __init__(self, settings: QuantizerSettings) -> None:
        """Keep the wanted group size."""
        self.group_size = settings.group_size

    def fit(self, weight: Tensor, bits: int, input_gram: Tensor, name: str) -> QuantizedWeight:
        """Weighted by the diagonal."""
        moment = input_gram.diagonal() if input_gram.dim() == 2 else input_gram
        return self._quantize_affine(weight, bits, moment, name)

    def quantize(self, linear: nn.Linear, bits: int, calibration: ModuleCalibration | None, name: str) -> QuantLinear:
        """The quantized layer; without calibration the fit is to the weight alone."""
        with torch.no_grad():
            weight = self._weight(linear, bits, calibration or ModuleCalibration(), name)
        layer = QuantLinear(weight, linear.bias, linear.weight.dtype)
        layer.calibration_digest = None if calibration is None else calibration.digest
        return layer

    def check(
        self, out_features: int, in_features: int, bits: int, calibration: ModuleCalibration | None, name: str
    ) -> None:
        """Bits, group size, and the calibration's shapes and values."""
        weight_format = self._format(out_features, in_features, bits, name)
        if calibration is not None and calibration.codes is not None:
            _check_codes(calibration.codes, weight_format, name)
        elif calibration is not None and calibration.input_second_moment is not None:
            _check_moment(calibration.input_second_moment, in_features, name)

    def _weight(self, linear: nn.Linear, bits: int, calibration: ModuleCalibration, name: str) -> QuantizedWeight:
        if calibration.codes is not None:
            weight_format = self._format(linear.out_features, linear.in_features, bits, name)
            return _stored_weight(weight_format, calibration.codes, linear.weight.device)
        moment = calibration.input_second_moment
        return self._quantize_affine(linear.weight, bits, None if moment is None else torch.from_numpy(moment), name)

    def _quantize_affine(self, weight: Tensor, bits: int, moment: Tensor | None, name: str) -> QuantizedWeight:
        group_size = fit_group_size(self.group_size, weight.shape[1], name)
        return quantize_affine(weight, bits=bits, group_size=group_size, input_second_moment=moment)

    def could_have_made(self, layer: nn.Module, bits: int, calibration: ModuleCalibration | None, name: str) -> bool:
        """By type, bits, group size and calibration."""
        return (
            isinstance(layer, QuantLinear)
            and layer.bits == bits
            and layer.weight_format.group_size == fit_group_size(self.group_size, layer.in_features, name)
            and layer.calibration_digest == (None if calibration is None else calibration.digest)
        )

    def num_bytes(self, out_features: int, in_features: int, bits: int, name: str) -> tuple[int, int]:
        """Bytes of (codes, metadata)."""
        weight_format = self._format(out_features, in_features, bits, name)
        return weight_format.weight_bytes, weight_format.metadata_bytes

    def _format(self, out_features: int, in_features: int, bits: int, name: str) -> WeightFormat:
        if bits not in NATIVE_BITS:
            raise InvalidPlanError(f"bits={bits} of {name!r} has no native format; choose one of {NATIVE_BITS} or 16.")
        return WeightFormat(bits, fit_group_size(self.group_size, in_features, name), out_features, in_features)


class ErrorFeedbackBackend(NativeBackend):
    """The native format, fitted with error feedback (GPTQ), which needs the inputs' whole Gram.

    Args:
        settings: as for the native backend.
    """

    keeps_codes = True

    def fit(self, weight: Tensor, bits: int, input_gram: Tensor, name: str) -> QuantizedWeight:
        """With feedback; where only the diagonal was measured there is none, and the affine fit is what it gives."""
        if input_gram.dim() == 1:
            return super().fit(weight, bits, input_gram, name)
        group_size = fit_group_size(self.group_size, weight.shape[1], name)
        return quantize_with_error_feedback(weight, bits=bits, group_size=group_size, input_gram=input_gram)

    def check(
        self, out_features: int, in_features: int, bits: int, calibration: ModuleCalibration | None, name: str
    ) -> None:
        """The codes have to be there, too."""
        if calibration is None or calibration.codes is None:
            raise InvalidPlanError(
                f"{name!r}: quant_backend 'gptq' needs a calibrated plan, which carries the codes; calibrate it with "
                "peft_autoqra.calibrate_plan(...), or use 'native'."
            )
        super().check(out_features, in_features, bits, calibration, name)


def _stored_weight(weight_format: WeightFormat, stored: StoredCodes, device: torch.device) -> QuantizedWeight:
    """A quantized weight from its bytes.

    Args:
        weight_format: bits, group size and shape.
        stored: tensors of such a weight; not copied on the CPU.
        device: of the result.
    """
    return QuantizedWeight(
        weight_format,
        *(torch.from_numpy(array).to(device) for array in (stored.codes, stored.scale_codes, stored.scale_base)),
    )


def _check_codes(stored: StoredCodes, weight_format: WeightFormat, name: str) -> None:
    found = (stored.codes.shape, stored.scale_codes.shape, stored.scale_base.shape)
    if found != weight_format.tensor_shapes:
        raise PlanMismatchError(
            f"The plan carries codes and metadata of shapes {found} for {name!r}, {weight_format} takes "
            f"{weight_format.tensor_shapes}; use the base model, bits and group size that were calibrated, or "
            "calibrate again."
        )
    if not torch.isfinite(torch.from_numpy(stored.scale_base).view(torch.bfloat16)).all():
        raise InvalidPlanError(f"The plan carries scales of {name!r} that are not finite; calibrate again.")


def _check_moment(moment: npt.NDArray[np.float32], in_features: int, name: str) -> None:
    if moment.shape != (in_features,):
        raise PlanMismatchError(
            f"The calibration of {name!r} is for an input of shape {moment.shape}, the model has ({in_features},); "
            "use the base model that was calibrated."
        )
    if not (np.isfinite(moment).all() and (moment >= 0).all()):
        raise InvalidPlanError(
            f"The calibration of {name!r} holds input moments that are negative or not finite; calibrate again."
        )
