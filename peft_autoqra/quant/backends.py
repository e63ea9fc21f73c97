"""Ways to quantize a linear layer, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from peft_autoqra.dense_layers import DenseLayer, as_linear, make_dense_layer
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import DENSE_BITS, QuantizerSettings
from peft_autoqra.plan_calibration import ModuleCalibration
from peft_autoqra.quant.bitsandbytes_backend import BitsAndBytesBackend
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.native_backend import ErrorFeedbackBackend, NativeBackend
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.quant.quantized_weight import QuantizedWeight

QuantizedLayer = QuantLinear | NF4Linear | Int8Linear
"""What a backend makes; each has ``bits``, ``bias``, ``dequantize`` and the ``dense_class`` that it stands for."""
QUANTIZED_LAYERS = (QuantLinear, NF4Linear, Int8Linear)
"""The same for ``isinstance``."""


class QuantBackend(Protocol):
    """Quantizes linear layers and knows their bytes beforehand."""

    def quantize(
        self, linear: nn.Linear, bits: int, calibration: ModuleCalibration | None, name: str
    ) -> QuantizedLayer:
        """The quantized layer; ``linear`` stays as it is."""
        ...

    def check(
        self, out_features: int, in_features: int, bits: int, calibration: ModuleCalibration | None, name: str
    ) -> None:
        """See beforehand whether :meth:`quantize` will work.

        Raises:
            InvalidPlanError: bits, shape or calibration that the backend cannot do with.
            PlanMismatchError: the calibration is of another shape.
        """
        ...

    def could_have_made(self, layer: nn.Module, bits: int, calibration: ModuleCalibration | None, name: str) -> bool:
        """Whether ``layer`` is what :meth:`quantize` makes with these arguments of some dense layer."""
        ...

    def num_bytes(self, out_features: int, in_features: int, bits: int, name: str) -> tuple[int, int]:
        """Bytes of (codes, metadata) that :meth:`quantize` will make.

        Raises:
            InvalidPlanError: the backend cannot quantize this shape to these bits.
        """
        ...


class CalibratedBackend(QuantBackend, Protocol):
    """A backend whose result depends on calibration."""

    keeps_codes: bool
    """Whether a plan has to carry the codes, because they depend on more than the inputs' second moments."""

    def fit(self, weight: Tensor, bits: int, input_gram: Tensor, name: str) -> QuantizedWeight:
        """Quantize a weight ``[N, K]`` with what calibration measured: ``E[x x^T]`` or its diagonal."""
        ...


BACKENDS: dict[str, Callable[[QuantizerSettings], QuantBackend]] = {
    "native": NativeBackend,
    "gptq": ErrorFeedbackBackend,
    "bitsandbytes": BitsAndBytesBackend,
}
"""By the names in ``plan.BACKENDS``."""


def make_backend(settings: QuantizerSettings) -> QuantBackend:
    """The backend of a plan's quantizer settings."""
    return BACKENDS[settings.backend](settings)


def calibrated_backend(settings: QuantizerSettings) -> CalibratedBackend:
    """The backend of settings that take a calibration.

    Raises:
        InvalidPlanError: theirs takes none.
    """
    backend = make_backend(settings)
    if not isinstance(backend, NativeBackend):
        raise InvalidPlanError(f"The {settings.backend} backend takes no calibration; use 'native' or 'gptq'.")
    return backend


def quantize_layer(
    backend: QuantBackend, layer: DenseLayer, bits: int, calibration: ModuleCalibration | None, name: str
) -> QuantizedLayer:
    """The quantized form of an ``nn.Linear`` or ``Conv1D``, which stays as it is."""
    quantized = backend.quantize(as_linear(layer), bits, calibration, name)
    quantized.dense_class = type(layer)
    return quantized.train(layer.training)


def dense_layer(layer: QuantizedLayer) -> DenseLayer:
    """A layer of the class that was quantized, with the dequantized weight and a copy of the bias."""
    bias = layer.bias
    if bias is not None:
        bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return make_dense_layer(layer.dense_class, layer.dequantize(), bias).train(layer.training)


def layer_bits(layer: nn.Module) -> int:
    """Bits of a layer's weight; 16 for anything not quantized by this package."""
    return layer.bits if isinstance(layer, QUANTIZED_LAYERS) else DENSE_BITS
