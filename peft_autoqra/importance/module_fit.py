"""Quantizing one module and starting its adapter, so that together they lose the least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.compensation import InputMetric, WhitenedError, output_scale, whiten_error
from peft_autoqra.importance.statistics import CalibrationStatistics, ModuleStatistics
from peft_autoqra.quant.quantized_weight import QuantizedWeight

Fit = Callable[[Tensor, int, Tensor, str], QuantizedWeight]
"""(weight ``[N, K]``, bits, input Gram ``[K, K]`` or ``[K]``, module name) to the quantized weight."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What the choice of a correction depends on, beside weight, statistics and quantizer.

    Attributes:
        max_rank: largest rank of a correction.
        alternations: how often the weight is quantized again with the correction of ``max_rank`` taken off (LoftQ, Li
            et al. 2023, algorithm 1, under the metric of the loss). Then codes and correction fit each other at that
            rank only, so a search over ranks has to do without.

    Raises:
        CalibrationError: a number that is negative or no integer.
    """

    max_rank: int
    alternations: int = 0

    def __post_init__(self) -> None:
        """Check."""
        for name in ("max_rank", "alternations"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CalibrationError(f"{name}={value!r} must be an integer of at least 0.")


@dataclass(frozen=True, eq=False)
class ModuleFit:
    """One module at one bit-width.

    Attributes:
        weight: the quantized weight.
        rises: estimated loss rise with the best correction of each rank, nats per token, ``[max_rank + 1]``, float64.
        left: correction, ``[out_features, r]``, float32, ``r = min(max_rank, out_features, in_features)``.
        right: correction, ``[r, in_features]``, float32. The first components are the best of a smaller rank.
    """

    weight: QuantizedWeight
    rises: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class CalibratedModule:
    """A linear module's weight with what calibration measured.

    Attributes:
        name: of the module.
        weight: ``[out_features, in_features]``, float32.
        statistics: of its inputs and gradients.
        metric: of its inputs.
        scale: of its outputs, ``[out_features]``.
    """

    name: str
    weight: Tensor
    statistics: ModuleStatistics
    metric: InputMetric
    scale: Tensor

    def fit(self, quantize: Fit, bits: int, settings: FitSettings) -> ModuleFit:
        """Quantize and correct; of several alternations the one that leaves the least."""
        rank = min(settings.max_rank, *self.weight.shape)
        quantized, whitened = self._quantize(quantize, bits, self.weight, rank)
        left, right = whitened.factors(rank)
        for _ in range(settings.alternations if rank else 0):
            again, error = self._quantize(quantize, bits, self.weight - left @ right, rank)
            if error.residuals(rank)[-1] >= whitened.residuals(rank)[-1]:
                break
            quantized, whitened = again, error
            left, right = whitened.factors(rank)
        return ModuleFit(quantized, whitened.residuals(settings.max_rank).cpu() / 2, left.cpu(), right.cpu())

    def _quantize(self, quantize: Fit, bits: int, target: Tensor, rank: int) -> tuple[QuantizedWeight, WhitenedError]:
        """Quantize ``target``; the error is against the module's weight."""
        quantized = quantize(target, bits, self.statistics.input_gram, self.name)
        return quantized, whiten_error(self.weight - quantized.dequantize(), self.metric, self.scale, rank)


def calibrated_modules(
    weights: Iterable[tuple[str, Tensor]], statistics: CalibrationStatistics
) -> Iterator[CalibratedModule]:
    """Join weights and statistics; modules that share an input are cheapest when they follow each other.

    Args:
        weights: module names and weights ``[out_features, in_features]``, from ``linear_weights``.
        statistics: of at least these modules.

    Raises:
        CalibrationError: a module that was not calibrated, or one of another shape.
    """
    gram, metric = None, None
    for name, weight in weights:
        if name not in statistics:
            raise CalibrationError(f"{name!r} was not calibrated; calibrate it with the other modules.")
        module = statistics[name]
        wanted = (len(module.output_gradient_second_moment), len(module.input_gram))
        if weight.shape != wanted:
            raise CalibrationError(
                f"{name!r} has a weight of shape {tuple(weight.shape)}, but was calibrated with {wanted}; calibrate "
                "the model that is to be quantized."
            )
        if metric is None or gram is not module.input_gram:
            gram = module.input_gram
            metric = InputMetric(gram.to(weight.device))
        on_device = replace(
            module,
            input_gram=module.input_gram.to(weight.device),
            output_gradient_second_moment=module.output_gradient_second_moment.to(weight.device),
        )
        scale = output_scale(on_device.output_gradient_second_moment)
        yield CalibratedModule(name, weight.detach().to(torch.float32), on_device, metric, scale)
