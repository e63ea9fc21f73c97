"""Calibrating a plan that was not searched: fit weights and initial adapters for exactly its bits and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_autoqra.importance.calibration import CalibrationOptions, calibrate, linear_weights
from peft_autoqra.importance.calibration_bank import bank_entry
from peft_autoqra.importance.module_fit import FitSettings, calibrated_modules
from peft_autoqra.plan import DENSE_BITS, BitRankPlan
from peft_autoqra.plan_calibration import PlanCalibration
from peft_autoqra.quant.backends import calibrated_backend
from peft_autoqra.tuner.target_checks import check_shape_and_rank


def calibrate_plan(
    plan: BitRankPlan,
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    alternations: int = 0,
    cache_dir: str | Path | None = None,
) -> BitRankPlan:
    """The plan with calibration: quantization weighted by activations, adapters started at the correction.

    With the ``"gptq"`` backend, and with ``alternations``, the plan also carries the quantized weights, since nothing
    less gives them again: its files, and those of adapters made with it, grow by the size of the quantized model.

    Example:
        ```python
        batches = [tokenizer(text, return_tensors="pt") for text in texts]
        plan = calibrate_plan(uniform_plan(base, bits=3, rank=16), base, batches)
        model = get_peft_model(base, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
        ```

    Args:
        plan: with a quantizer that takes a calibration.
        model: the unquantized model the plan is for; left as it was.
        batches: ``input_ids`` ``[batch, seq]`` and, where there are any, ``attention_mask`` and ``labels``; a few
            thousand tokens of the task's training data will do.
        alternations: how often weight and correction are fitted to each other again, at most; see
            :class:`FitSettings`.
        cache_dir: where calibration statistics are kept, and found again; None keeps none.

    Raises:
        InvalidPlanError: the plan's backend takes no calibration, or a layer cannot have its bits or rank.
        PlanMismatchError: a layer has another shape than the plan says.
        CalibrationError: no data, an unknown module or one that the data never reaches, values that are not finite.
    """
    backend = calibrated_backend(plan.quantizer)
    settings = FitSettings(max_rank=0, alternations=alternations)
    names = [name for name, layer in plan.items() if layer.bits != DENSE_BITS]
    if not names:
        return plan.replace(initialization="compensate", calibration=PlanCalibration())
    for name, weight in linear_weights(model, names):
        shape = (weight.shape[0], weight.shape[1])
        backend.num_bytes(*shape, plan[name].bits, name)
        check_shape_and_rank(name, shape, plan[name], plan)
    options = CalibrationOptions(directory=None if cache_dir is None else Path(cache_dir))
    statistics = calibrate(model, batches, names, options)
    moments, corrections, codes = {}, {}, {}
    with torch.no_grad():
        for module in calibrated_modules(linear_weights(model, names), statistics):
            name, layer = module.name, plan[module.name]
            fit = module.fit(backend.fit, layer.bits, replace(settings, max_rank=layer.rank))
            entry = bank_entry(module, fit)
            if backend.keeps_codes or (alternations and layer.rank):
                codes[name] = entry.codes
            else:
                moments[name] = entry.input_second_moment
            if layer.rank:
                corrections[name] = entry.correction
    calibration = PlanCalibration(input_second_moments=moments, corrections=corrections, codes=codes)
    return plan.replace(initialization="compensate", calibration=calibration)
