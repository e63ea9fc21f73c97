"""Decoding on the CPU by kernels that torch.compile makes; needs a C++ compiler and is off unless asked for."""

from __future__ import annotations

import shutil
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.quant.packing import unpack_codes

_enabled = False


def enable_compiled_decode(enabled: bool = True) -> None:
    """Let quantized layers on the CPU decode by compiled kernels, for the whole process; results stay the same.

    The first use of each combination of bits, group size and dtype compiles for some seconds.

    Args:
        enabled: False goes back to PyTorch's own operations.

    Raises:
        MissingDependencyError: no C++ compiler is found.
    """
    global _enabled
    if enabled and not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        raise MissingDependencyError("Compiled decoding needs a C++ compiler; install g++, or leave it off.")
    _enabled = enabled


def is_enabled() -> bool:
    """Whether :func:`enable_compiled_decode` is in force."""
    return _enabled


def decode_whole(
    codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The plain formula, ``[G, group_size]``; arguments as in :func:`peft_autoqra.quant.decoding.decode_groups`."""
    values = unpack_codes(codes, bits, scale.numel() * group_size).view(-1, group_size)
    return (values.float() * scale[:, None] + offset[:, None]).to(dtype)


@cache
def _compiled(bits: int, group_size: int, dtype: torch.dtype) -> Any:
    """A compiled :func:`decode_whole` of its own for every combination, in which only the number of groups varies."""
    # Dynamo counts recompilations per code object, and at most 8: each combination gets its own.
    name = f"decode_{bits}_bits_groups_of_{group_size}_to_{str(dtype).removeprefix('torch.')}"
    function = FunctionType(decode_whole.__code__.replace(co_name=name), decode_whole.__globals__, name)
    return torch.compile(function, fullgraph=True, dynamic=True)


def decode_compiled(
    codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """As :func:`decode_whole`, by a compiled kernel."""
    decoded: Tensor = _compiled(bits, group_size, dtype)(codes, scale, offset, bits, group_size, dtype)
    return decoded
