"""Error feedback: each column's rounding error is repaid by the columns that are still to be rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_autoqra.errors import CalibrationError
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.packing import pack_codes
from peft_autoqra.quant.quantized_weight import SYMMETRIC_BITS, QuantizedWeight, decode_scale_codes

DAMPING = 1e-2
"""Fraction of the mean diagonal that is added to the Gram, as GPTQ does."""

_COLUMNS_AT_ONCE = 128


def quantize_with_error_feedback(weight: Tensor, *, bits: int, group_size: int, input_gram: Tensor) -> QuantizedWeight:
    """Quantize to the native format so that ``tr (W - Q) H (W - Q)^T`` is small, H the inputs' whole second moment.

    GPTQ (Frantar et al. 2023, algorithm 1): columns are rounded in the order of falling ``H[j, j]``, and after each
    the remaining ones move by the least-squares answer to its error. Scales and offsets are those of
    :func:`quantize_affine`, fitted before, so the columns of a group need not be neighbours in that order.

    Args:
        weight: ``[out_features, in_features]``, any floating dtype.
        bits: 2, 3, 4 or 8.
        group_size: divides ``in_features``.
        input_gram: ``E[x x^T]`` of the module's inputs, ``[in_features, in_features]``.

    Raises:
        InvalidPlanError: unsupported bits, or a group size that does not divide.
        CalibrationError: a Gram of the wrong shape, not finite, or not positive definite even when damped; a weight
            that is not finite.
    """
    start = quantize_affine(
        weight, bits=bits, group_size=group_size, input_second_moment=_checked_diagonal(input_gram, weight)
    )
    scale, offset = _scales(start)
    order = torch.argsort(input_gram.diagonal().to(weight.device), descending=True, stable=True)
    feedback = _feedback(input_gram.to(weight.device)[order][:, order])
    group = order // group_size
    codes = _round_columns(weight.float()[:, order], scale[:, group], offset[:, group], feedback, 2**bits - 1)
    packed = pack_codes(codes[:, torch.argsort(order)].contiguous(), bits)
    return QuantizedWeight(start.format, packed, start.scale_codes, start.scale_base)


def _checked_diagonal(gram: Tensor, weight: Tensor) -> Tensor:
    size = weight.shape[1]
    if gram.shape != (size, size) or not torch.isfinite(gram).all():
        raise CalibrationError(
            f"The input Gram must be finite and of shape {(size, size)}, not {tuple(gram.shape)}; calibrate the model "
            "that is to be quantized."
        )
    return gram.diagonal()


def _scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Decoded scale and offset of every group, each ``[out_features, in_features / group_size]``, float32."""
    shape = weight.format.out_features, -1
    if weight.format.bits == SYMMETRIC_BITS:
        scale = weight.scale_base.view(torch.bfloat16).float().view(shape)
        return scale, -128 * scale
    scale, offset = decode_scale_codes(weight.scale_codes, weight.scale_base)
    return scale.view(shape), offset.view(shape)


def _feedback(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Gram's inverse, ``[K, K]``, float32; identity where the Gram is zero."""
    damped = gram.double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise CalibrationError("The input Gram is not positive definite; calibrate with more tokens.")
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper.float()


def _round_columns(weight: Tensor, scale: Tensor, offset: Tensor, feedback: Tensor, top: int) -> Tensor:
    """Codes of all columns, uint8 ``[N, K]``; all arguments but the last two ``[N, K]``, in the order of rounding.

    Works on transposed copies: a column is then contiguous. Errors reach far columns once per block.
    """
    values, steps, lows = (tensor.T.contiguous() for tensor in (weight, scale, offset))
    steps = torch.where(steps == 0, torch.inf, steps)
    codes = torch.empty_like(values, dtype=torch.uint8)
    for first in range(0, len(values), _COLUMNS_AT_ONCE):
        last = min(first + _COLUMNS_AT_ONCE, len(values))
        errors = torch.empty_like(values[first:last])
        for column in range(first, last):
            code = ((values[column] - lows[column]) / steps[column]).round_().clamp_(0, top)
            codes[column] = code.to(torch.uint8)
            decoded = torch.addcmul(lows[column], code, torch.where(steps[column].isinf(), 0.0, steps[column]))
            error = (values[column] - decoded) / feedback[column, column]
            errors[column - first] = error
            values[column + 1 : last].addr_(feedback[column, column + 1 : last], error, alpha=-1)
        values[last:].addmm_(feedback[first:last, last:].T, errors, alpha=-1)
    return codes.T
