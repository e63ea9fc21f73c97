"""Ways to quantize a linear layer, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

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
"""What a backend makes; each has ``bits``, ``bias`` and ``dequantize``."""
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


def dense_linear(layer: QuantizedLayer) -> nn.Linear:
    """An ``nn.Linear`` with the dequantized weight of a quantized layer and a copy of its bias."""
    weight = layer.dequantize()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return linear.train(layer.training)


def layer_bits(layer: nn.Module) -> int:
    """Bits of a layer's weight; 16 for anything not quantized by this package."""
    return layer.bits if isinstance(layer, QUANTIZED_LAYERS) else DENSE_BITS
