"""One model in memory that becomes candidate after candidate: no reload, no second quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch
from torch import Tensor, nn

from peft_autoqra.dense_layers import DenseLayer, dense_weight, make_dense_layer, set_dense_weight
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.evaluation.shared_adapter import SharedAdapter
from peft_autoqra.importance.calibration_bank import CalibrationBank
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.quant.backends import make_backend

_FREE_MEMORY_SHARE = 0.5  # the rest is for training the candidates


class ResidentModel:
    """A dense model whose targeted weights are those that a plan's quantized layers decode.

    So training and scoring on it give what the quantized model gives, at the speed of dense layers.

    Args:
        model: unquantized; its targeted weights are replaced until :meth:`restore`.
        linears: the targeted layers.
        bank: calibration of these layers, with their quantized weights.
        materialize: keep the decoded weights of every (module, bits) that was used, so that switching a plan moves
            pointers only. False decodes each time. None materializes where all bit-widths of the bank fit into half
            of the free memory.
        memory_share: of the free memory that is this process's to use; others on the machine have the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, DenseLayer],
        bank: CalibrationBank,
        *,
        materialize: bool | None = None,
        memory_share: float = 1.0,
    ) -> None:
        """Keep the weights, and room for one plan's."""
        self.model = model
        self._bank = bank
        self._linears = dict(linears)
        self._originals = {name: dense_weight(layer) for name, layer in linears.items()}
        num_copies = len(bank.settings.bit_choices)
        fits = _fits(self._originals, num_copies, memory_share)
        self.materializes = fits if materialize is None else materialize
        self._buffers: dict[str, Tensor] = {}
        self._decoded: dict[tuple[str, int, QuantizerSettings], Tensor] = {}
        self._factors: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._loaded: dict[str, object] = {}

    def load(self, plan: BitRankPlan, *, with_corrections: bool, shared: SharedAdapter | None = None) -> None:
        """Take on a plan's weights; modules that already have them are left alone.

        Args:
            plan: names every targeted module.
            with_corrections: add each module's initial adapter to its weight, where the plan starts compensated; what
                the model computes before the first training step.
            shared: of a supernet; added, too, cut to each module's rank.
        """
        add = with_corrections and plan.initialization == "compensate"
        with torch.no_grad():
            for name, layer in plan.items():
                corrected = add and layer.bits != DENSE_BITS and layer.rank > 0
                borrowed = shared if layer.rank else None
                rank = layer.rank if corrected or borrowed else 0
                key = (layer.bits, rank, corrected, borrowed, plan.quantizer)
                if self._loaded.get(name) != key:
                    self._loaded.pop(name, None)  # its buffer is neither plan's if this is interrupted
                    added = [self._correction(name, layer)] if corrected else []
                    added += [borrowed.cut(name, rank)] if borrowed else []
                    set_dense_weight(self._linears[name], self._weight(name, layer.bits, added, plan.quantizer))
                    self._loaded[name] = key

    def restore(self) -> None:
        """Put the original weights back."""
        for name, weight in self._originals.items():
            set_dense_weight(self._linears[name], weight)
        self._loaded.clear()

    def _weight(
        self, name: str, bits: int, added: Sequence[tuple[Tensor, Tensor]], quantizer: QuantizerSettings
    ) -> Tensor:
        """Dense weight of a layer plus products of factors, each ``[out_features, r]`` and ``[r, in_features]``."""
        dense = self._originals[name] if bits == DENSE_BITS else self._dense(name, bits, quantizer)
        if not added:
            return dense
        left, right = torch.cat([left for left, _ in added], 1), torch.cat([right for _, right in added])
        return torch.addmm(dense, left, right, out=self._buffer(name))

    def _dense(self, name: str, bits: int, quantizer: QuantizerSettings) -> Tensor:
        """What the quantized layer decodes, in the dtype of the original."""
        key = (name, bits, quantizer)
        if key in self._decoded:
            return self._decoded[key]
        original = self._originals[name]
        if quantizer == self._bank.settings.quantizer:
            target = _room_for(original) if self.materializes else self._buffer(name)
            dense = self._bank.entry(name, bits).weight.dequantize_into(target)
        else:
            linear = make_dense_layer(nn.Linear, original, None)
            dense = make_backend(quantizer).quantize(linear, bits, None, name).dequantize(original.dtype)
        if self.materializes:
            self._decoded[key] = dense
        return dense

    def _correction(self, name: str, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        """Factors of the initial adapter, in dtype and on the device of the weight."""
        key = (name, layer.bits)
        if key not in self._factors:
            original, correction = self._originals[name], self._bank.entry(*key).correction
            left, right = (torch.from_numpy(side).to(original) for side in (correction.left, correction.right))
            self._factors[key] = (left, right)
        left, right = self._factors[key]
        if layer.rank > len(right):
            raise InvalidPlanError(
                f"Rank {layer.rank} of {name!r} is above the calibrated {len(right)}; calibrate higher."
            )
        return left[:, : layer.rank], right[: layer.rank]

    def _buffer(self, name: str) -> Tensor:
        """The one place for a weight of this module that is not kept."""
        if name not in self._buffers:
            self._buffers[name] = _room_for(self._originals[name])
        return self._buffers[name]


def _room_for(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _fits(weights: Mapping[str, Tensor], num_copies: int, memory_share: float) -> bool:
    """Whether copies of all weights fit into a share of the free memory of their device, with room to spare."""
    needed = num_copies * sum(weight.numel() * weight.element_size() for weight in weights.values())
    device = next(iter(weights.values())).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return needed < _FREE_MEMORY_SHARE * memory_share * free
