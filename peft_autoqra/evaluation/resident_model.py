"""One model in memory that becomes candidate after candidate: no reload, no second quantization."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_autoqra.importance.calibration_bank import CalibrationBank
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.quant.backends import QuantizedLayer, make_backend


class ResidentModel:
    """A dense model whose targeted weights are overwritten with a plan's dequantized ones.

    The weights are what the plan's quantized layers would decode, so training and scoring on it give what the
    quantized model gives, at the speed of dense layers. Every (module, bits, quantizer) is quantized once.

    Args:
        model: unquantized; its targeted weights are overwritten until :meth:`restore`.
        linears: the targeted layers.
        bank: calibration of these layers.
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Linear], bank: CalibrationBank) -> None:
        """Keep a copy of the weights."""
        self.model = model
        self._bank = bank
        self._linears = dict(linears)
        self._originals = {name: layer.weight.detach().clone() for name, layer in linears.items()}
        self._quantized: dict[tuple[str, int, QuantizerSettings], QuantizedLayer] = {}
        self._loaded: dict[str, object] = {}

    def load(self, plan: BitRankPlan, *, with_corrections: bool) -> None:
        """Take on a plan's weights; modules that already have them are left alone.

        Args:
            plan: names every targeted module.
            with_corrections: add each module's initial adapter to its weight, where the plan starts compensated; what
                the model computes before the first training step.
        """
        add = with_corrections and plan.initialization == "compensate"
        for name, layer in plan.items():
            key = (layer.bits, layer.rank if add else 0, plan.quantizer)
            if self._loaded.get(name) == key:
                continue
            with torch.no_grad():
                self._linears[name].weight.copy_(self._weight(name, layer, plan.quantizer, add))
            self._loaded[name] = key

    def restore(self) -> None:
        """Put the original weights back."""
        with torch.no_grad():
            for name, weight in self._originals.items():
                self._linears[name].weight.copy_(weight)
        self._loaded.clear()

    def _weight(self, name: str, layer: LayerPlan, quantizer: QuantizerSettings, add_correction: bool) -> Tensor:
        if layer.bits == DENSE_BITS:
            return self._originals[name]
        dense: Tensor = self._quantized_layer(name, layer.bits, quantizer).dequantize(torch.float32)
        if add_correction and layer.rank:
            correction = self._bank.calibrations[layer.bits].corrections[name]
            left = torch.from_numpy(correction.left[:, : layer.rank]).to(dense.device, torch.float32)
            right = torch.from_numpy(correction.right[: layer.rank]).to(dense.device, torch.float32)
            dense = torch.addmm(dense, left, right)
        return dense

    def _quantized_layer(self, name: str, bits: int, quantizer: QuantizerSettings) -> QuantizedLayer:
        key = (name, bits, quantizer)
        if key not in self._quantized:
            original = self._originals[name]
            linear = nn.Linear(original.shape[1], original.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(original, requires_grad=False)
            calibration = self._bank.calibrations.get(bits)
            moment = torch.from_numpy(calibration.input_second_moments[name]) if calibration else None
            self._quantized[key] = make_backend(quantizer).quantize(linear, bits, moment, name)
        return self._quantized[key]
