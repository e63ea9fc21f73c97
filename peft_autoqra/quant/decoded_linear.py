"""What all layers with decoded weights share: products that keep nothing dense."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Layer = TypeVar("Layer", bound="DecodedLinear")


class Decoder(Protocol):
    """A format that turns the tensors of a quantized weight into a dense one."""

    def decode(self, tensors: tuple[Tensor, ...], dtype: torch.dtype, *, temporary: bool = False) -> Tensor:
        """The dense weight, ``[out_features, in_features]``; ``temporary``: used before anything else is decoded."""
        ...


class _DecodedProduct(torch.autograd.Function):
    """``x @ W.T + b`` whose backward decodes W again instead of keeping it dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decoder: Decoder, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.decoder = decoder
        product = torch.nn.functional.linear(x, decoder.decode(tensors, x.dtype, temporary=True), bias)
        # A bias makes it a view, and autograd refuses that the view which a function returns is changed in place.
        output: Tensor = torch.ops.aten._unsafe_view(product, product.shape)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            weight = ctx.decoder.decode(ctx.saved_tensors, output_gradient.dtype, temporary=True)
            input_gradient = output_gradient @ weight
        if ctx.needs_input_grad[1]:
            bias_gradient = output_gradient.reshape(-1, output_gradient.shape[-1]).sum(0)
        return input_gradient, bias_gradient, *(None for _ in ctx.needs_input_grad[2:])


class DecodedLinear(nn.Module):
    """Frozen ``y = x W^T + b`` with W decoded at every pass; base of the layers of each format.

    The tensors of W are frozen parameters and not buffers, which DDP would broadcast at every step. The name ``W_q``
    of the first makes PEFT treat the layer as it treats HQQ's. All have an integer dtype, so that ``module.to(dtype)``
    cannot damage them.

    Args:
        decoder: the format of W.
        tensors: of W, by the names of the parameters that will hold them, in the order the decoder takes them.
        bias: kept as it is; may be trained.
        compute_dtype: dtype that :meth:`dequantize` returns by default: that of the weight before, until
            ``module.to(dtype)`` changes it.

    Attributes:
        dense_class: of the layer that it stands for, ``nn.Linear`` or ``Conv1D``.

    Shape:
        input ``[..., in_features]`` -> output ``[..., out_features]``, in the dtype of the input (or of autocast).
    """

    dense_class: type = nn.Linear
    bias: nn.Parameter | None
    in_features: int
    out_features: int

    def __init__(
        self, decoder: Decoder, tensors: dict[str, Tensor], bias: nn.Parameter | None, compute_dtype: torch.dtype
    ) -> None:
        """Take over the tensors."""
        super().__init__()
        self.decoder = decoder
        self.compute_dtype = compute_dtype
        self._tensor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that looks at a layer's ``weight``; decoded at every access."""
        return self.dequantize()

    @property
    def weight_tensors(self) -> tuple[Tensor, ...]:
        """The tensors of W."""
        return tuple(getattr(self, name) for name in self._tensor_names)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, ``[out_features, in_features]``, in ``dtype`` or the compute dtype."""
        return self.decoder.decode(self.weight_tensors, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = _DecodedProduct.apply(  # type: ignore[no-untyped-call]
            x, bias, self.decoder, *self.weight_tensors
        )
        return output

    def _apply(self: Layer, fn: Any, recurse: bool = True) -> Layer:
        """Let the compute dtype follow ``module.to(dtype)``, of which the integer tensors show nothing."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
