"""bitsandbytes' NF4 layer with double quantization, made safe on CPU."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

NF4_BLOCK = 64
"""Weights per absmax scale."""
NF4_NESTED_BLOCK = 256
"""Scales per second-level scale."""
NF4_CODEBOOK_BYTES = 16 * 4 + 256 * 4
"""Codebooks of the weights and of the scales, held by every layer."""


class NF4Linear(bnb.nn.Linear4bit):  # type: ignore[misc]
    """``Linear4bit`` with NF4 and double quantization, quantized at construction.

    Args:
        linear: the layer to quantize; its bias is taken over.
    """

    bits = 4
    dense_class: type = nn.Linear
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize the weight on the device it is on."""
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=False,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        # On CPUs with AVX512-BF16 the first forward without gradient would repack the weight in place; after that the
        # input gradient is None and the second quantization is undone (bitsandbytes 0.50.2).
        self.support_avx512bf16_for_cpu = False
        device = linear.weight.device
        weight = bnb.nn.Params4bit(
            linear.weight.detach().to("cpu" if device.type == "meta" else device, copy=True),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=self,
        )
        self.weight = weight.to(device)
        self.register_parameter("bias", linear.bias)
        self.original_dtype = linear.weight.dtype

    def store_codes_as(self, dtype: torch.dtype, device: torch.device) -> None:
        """See the same bytes as values of another dtype, which FSDP2 shards only if it is a floating one.

        Changes nothing about the weight. Codes that are no whole number of such values stay bytes.

        Args:
            dtype: what the bytes are seen as; ``module.to(dtype)`` would damage them from then on.
            device: where the layer will compute; FSDP2 moves the codes there, but not the scales.
        """
        state = self.weight.quant_state
        state.to(device)
        codes = self.weight.data.view(-1).view(torch.uint8)
        if codes.numel() % dtype.itemsize:
            self.weight.data = self.weight.data.to(device)  # FSDP2 leaves it where it is
            return
        self.quant_storage = dtype
        self.weight = bnb.nn.Params4bit(
            codes.view(dtype).view(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            quant_type="nf4",
            quant_storage=dtype,
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = state

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        """Let the dtype of the dense weight follow ``module.to(dtype)``."""
        super()._apply(fn, recurse)
        self.original_dtype = fn(torch.empty(0, dtype=self.original_dtype)).dtype
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, ``[out_features, in_features]``, in ``dtype`` or the dtype before quantization."""
        dense: Tensor = bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return dense.to(dtype or self.original_dtype)
