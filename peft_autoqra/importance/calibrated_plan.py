"""Calibrating a plan that was not searched: fit weights and initial adapters for exactly its bits and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.importance.calibration import calibrate, linear_weights
from peft_autoqra.importance.calibration_bank import affine_quantizer, to_float16
from peft_autoqra.importance.error_table import ErrorTableSettings, build_error_table
from peft_autoqra.plan import DENSE_BITS, BitRankPlan
from peft_autoqra.plan_calibration import Correction, PlanCalibration


def calibrate_plan(plan: BitRankPlan, model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> BitRankPlan:
    """The plan with calibration: quantization weighted by activations, adapters started at the correction.

    Args:
        plan: with the native quantizer.
        model: the unquantized model the plan is for; left as it was.
        batches: ``input_ids`` ``[batch, seq]`` and, where there are any, ``attention_mask`` and ``labels``; a few
            thousand tokens of the task's training data will do.

    Raises:
        InvalidPlanError: the plan's backend takes no calibration.
        CalibrationError: no data, a module that the data never reaches, values that are not finite.
    """
    if plan.quantizer.backend != "native":
        raise InvalidPlanError(f"The {plan.quantizer.backend} backend takes no calibration; use the native one.")
    names = [name for name, layer in plan.items() if layer.bits != DENSE_BITS]
    if not names:
        return plan.replace(initialization="compensate", calibration=PlanCalibration())
    statistics = calibrate(model, batches, names)
    corrections: dict[str, Correction] = {}

    def keep(name: str, bits: int, left: Tensor, right: Tensor) -> None:
        del bits
        rank = plan[name].rank
        if rank:
            corrections[name] = Correction(left=to_float16(left[:, :rank]), right=to_float16(right[:rank]))

    quantize = affine_quantizer(plan.quantizer)
    for bits in sorted({plan[name].bits for name in names}):
        group = [name for name in names if plan[name].bits == bits]
        settings = ErrorTableSettings(bit_choices=(bits,), max_rank=max(plan[name].rank for name in group))
        with torch.no_grad():
            build_error_table(linear_weights(model, group), statistics, quantize, settings, on_correction=keep)
    moments = {name: statistics[name].input_second_moment.numpy() for name in names}
    calibration = PlanCalibration(input_second_moments=moments, corrections=corrections)
    return plan.replace(initialization="compensate", calibration=calibration)
