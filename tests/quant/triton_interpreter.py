"""Run by test_triton_kernels.py in a process of its own, with TRITON_INTERPRET=1, and on a GPU as it is."""

import itertools

import torch

from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.packing import NATIVE_BITS
from peft_autoqra.quant.triton_kernels import dequantize, multiply_packed

SHAPES = ((5, 24, 8), (7, 640, 64), (37, 96, 32))  # odd rows, ragged last programs, two superblocks


def check(device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    torch.manual_seed(0)
    for bits, (rows, columns, group_size), dtype in itertools.product(NATIVE_BITS, SHAPES, dtypes):
        weight = quantize_affine(torch.randn(rows, columns), bits=bits, group_size=group_size)
        tensors = [tensor.to(device) for tensor in (weight.codes, weight.scale_codes, weight.scale_base)]
        dense = dequantize(weight.format, *tensors, dtype).cpu()
        if not torch.equal(dense, weight.dequantize(dtype)):
            raise ValueError(f"dequantize differs: {bits} bits, {(rows, columns, group_size)}, {dtype}")
        bias = torch.randn(rows, dtype=dtype)
        for x in (torch.randn(columns, dtype=dtype), torch.randn(1, 3, columns, dtype=dtype)):
            y = multiply_packed(weight.format, *tensors, x.to(device), bias.to(device)).cpu()
            torch.testing.assert_close(y.double(), x.double() @ dense.double().T + bias.double(), rtol=2e-2, atol=2e-2)
            if dtype == torch.float32:
                torch.testing.assert_close(y, x @ dense.T + bias, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    check("cpu", (torch.float32, torch.float16))  # the interpreter truncates to bfloat16 where a GPU rounds
