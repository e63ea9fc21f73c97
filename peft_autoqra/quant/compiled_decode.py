"""Decoding on the CPU in one pass, by kernels that torch.compile makes; needs a C++ compiler."""

from __future__ import annotations

import os
import shutil
import warnings
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.quant.packing import unpack_codes

LARGE_WEIGHT = 2**22
"""Weights of a layer from which compiling pays by itself: some seconds once, then less than half the time per pass."""

_WEIGHTS_AT_ONCE = 2**24
"""The kernel's words of unpacked codes are fresh memory: 16 MB, which the system hands out quickly."""

_COMPILERS = ("g++", "clang++", "c++", "cl")
_wanted: bool | None = None


def compile_decoding(enabled: bool | None) -> None:
    """Choose whether quantized layers on the CPU decode by compiled kernels, for the whole process.

    Results are the same to the last bit. The first use of each combination of bits, group size and dtype compiles for
    some seconds; torch keeps what it compiled for later processes.

    Args:
        enabled: None, as it is at the start, compiles for layers of at least 4 million weights where there is a C++
            compiler; True for all layers, False for none.

    Raises:
        MissingDependencyError: True, and no C++ compiler is found.
    """
    global _wanted
    if enabled and not _has_compiler():
        raise MissingDependencyError("Compiled decoding needs a C++ compiler; install g++, or leave it off.")
    _wanted = enabled


def compiles(num_weights: int) -> bool:
    """Whether a weight of this size is decoded by a compiled kernel."""
    if _wanted is None:
        return num_weights >= LARGE_WEIGHT and _has_compiler()
    return _wanted


def decode_into(dense: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int) -> None:
    """Write ``scale * q + offset`` into ``dense``, ``[G, group_size]``; others as in ``decoding.decode_groups``."""
    values = unpack_codes(codes, bits, scale.numel() * group_size).view(-1, group_size)
    dense.copy_(values.float() * scale[:, None] + offset[:, None])


def decode_compiled(dense: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int) -> bool:
    """As :func:`decode_into`, by a compiled kernel; False, once with a warning, where it cannot be compiled."""
    num_groups = _WEIGHTS_AT_ONCE // group_size
    chunks = zip(
        *(tensor.split(num_groups) for tensor in (dense, scale, offset)),
        codes.split(num_groups * group_size * bits // 8),
        strict=True,
    )
    try:
        kernel = _kernel(bits, group_size, dense.dtype)
        for target, chunk_scale, chunk_offset, chunk in chunks:
            kernel(target, chunk, chunk_scale, chunk_offset, bits, group_size)
    except Exception as error:  # whatever a tool chain can do wrong must not stop a training that works without it
        compile_decoding(False)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"Decoding cannot be compiled ({type(error).__name__}: {reason}); it goes on without. "
            "peft_autoqra.quant.compiled_decode.compile_decoding(False) turns it off beforehand.",
            stacklevel=2,
        )
        return False
    return True


@cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", _COMPILERS[0]), *_COMPILERS))


@cache
def _kernel(bits: int, group_size: int, dtype: torch.dtype) -> Any:
    """A compiled :func:`decode_into` of its own for every combination, in which only the number of groups varies."""
    # Dynamo counts recompilations per code object, and at most 8: each combination gets its own.
    name = f"decode_{bits}_bits_groups_of_{group_size}_to_{str(dtype).removeprefix('torch.')}"
    function = FunctionType(decode_into.__code__.replace(co_name=name), decode_into.__globals__, name)
    return torch.compile(function, fullgraph=True, dynamic=True)
