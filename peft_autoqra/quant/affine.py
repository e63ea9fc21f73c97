"""Fits of the native format to a weight: activation-weighted affine, its data-free fallback, symmetric 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_autoqra.errors import CalibrationError, InvalidPlanError
from peft_autoqra.quant.packing import NATIVE_BITS, pack_codes
from peft_autoqra.quant.quantized_weight import (
    SUPERBLOCK_GROUPS,
    SYMMETRIC_BITS,
    QuantizedWeight,
    WeightFormat,
    decode_scale_codes,
)

_RANGE_FRACTIONS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.9, 0.8, 0.7), 4: (1.0, 0.93, 0.86)}
_REFITS = 2
_WEIGHTS_AT_ONCE_ON_A_DEVICE = 2**22
_WEIGHTS_PER_THREAD_AT_ONCE = 2**16
"""On the CPU a chunk of the fit and its buffers stay in a core's cache."""


def quantize_affine(
    weight: Tensor, *, bits: int, group_size: int, input_second_moment: Tensor | None = None
) -> QuantizedWeight:
    """Quantize a weight to the native format.

    With ``input_second_moment`` each group minimizes ``sum_j E[x_j^2] (w_j - s q_j - m)^2`` over s, m and q: codes by
    rounding, (s, m) by weighted least squares, from several clipped ranges. Without it the group's largest value by
    magnitude is the end of a codebook with a level at zero; unweighted error would clip the outliers that matter.
    Sums run in float64, so that the codes do not depend on a machine's order of summation.

    Args:
        weight: ``[out_features, in_features]``, any floating dtype.
        bits: 2, 3, 4 or 8.
        group_size: divides ``in_features``.
        input_second_moment: ``E[x_j^2]`` of the module's inputs, ``[in_features]``, or None.

    Raises:
        InvalidPlanError: unsupported bits, or a group size that does not divide.
        CalibrationError: moments of the wrong shape, negative or not finite, or a weight that is not finite.
    """
    weight_format = _checked_format(weight, bits, group_size)
    moment = _checked_moment(input_second_moment, weight)
    if bits == SYMMETRIC_BITS:
        return _quantize_symmetric(weight.float(), weight_format)
    groups = weight.float().reshape(weight.shape[0], -1, group_size)  # [N, K/g, g]
    scale, offset = _in_row_chunks(groups, moment, bits)
    return _double_quantize(groups, scale.reshape(-1), offset.reshape(-1), weight_format)


def _checked_format(weight: Tensor, bits: int, group_size: int) -> WeightFormat:
    if bits not in NATIVE_BITS:
        raise InvalidPlanError(f"bits={bits} has no native format; choose one of {NATIVE_BITS}.")
    if weight.dim() != 2 or weight.shape[1] % group_size:
        raise InvalidPlanError(f"A weight of shape {tuple(weight.shape)} has no groups of {group_size} per row.")
    if weight.numel() and not all(torch.isfinite(end) for end in torch.aminmax(weight)):  # both NaN where there is one
        raise CalibrationError("The weight holds values that are not finite; it cannot be quantized.")
    return WeightFormat(bits, group_size, weight.shape[0], weight.shape[1])


def _checked_moment(moment: Tensor | None, weight: Tensor) -> Tensor | None:
    """Positive float32 weights of the fit with mean 1, ``[in_features]``."""
    if moment is None:
        return None
    if moment.shape != (weight.shape[1],):
        raise CalibrationError(f"input_second_moment has shape {tuple(moment.shape)}, needs ({weight.shape[1]},).")
    moment = moment.to(device=weight.device, dtype=torch.float32)
    if not torch.isfinite(moment).all() or (moment < 0).any():
        raise CalibrationError("input_second_moment must be finite and not negative.")
    mean = moment.double().mean().clamp_min(torch.finfo(torch.float32).tiny)
    # Inputs that calibration never saw still get a vote, or their weights would be arbitrary.
    return (moment / mean + 1e-4).float()


def _in_row_chunks(groups: Tensor, moment: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Fit all rows, a bounded number at a time; scale and offset, each ``[N, K/g]``."""
    if moment is None:
        return _fit_signed_absmax(groups, bits)
    group_moment = moment.view(1, *groups.shape[1:])
    on_cpu = groups.device.type == "cpu"
    size = _WEIGHTS_PER_THREAD_AT_ONCE * torch.get_num_threads() if on_cpu else _WEIGHTS_AT_ONCE_ON_A_DEVICE
    fits = [_fit_weighted(chunk, group_moment, bits) for chunk in groups.split(max(1, size // groups[0].numel()))]
    return torch.cat([scale for scale, _ in fits]), torch.cat([offset for _, offset in fits])


def _fit_signed_absmax(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The value of largest magnitude takes code 0, zero takes code 2^(bits-1)."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = -extreme / 2 ** (bits - 1)
    return scale, extreme.clone()


def _fit_weighted(groups: Tensor, moment: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Best weighted fit from several starting ranges; scale and offset, each ``[rows, K/g]``."""
    low, high = groups.amin(-1), groups.amax(-1)
    regression = _Regression(groups, moment)
    best_gain = torch.full_like(low, -torch.inf, dtype=torch.float64)
    best_scale, best_offset = torch.zeros_like(low), torch.zeros_like(low)
    codes = torch.empty_like(groups)
    for fraction in _RANGE_FRACTIONS[bits]:
        scale, offset = (high - low) * (fraction / (2**bits - 1)), low * fraction
        for _ in range(_REFITS):
            scale, offset, gain = regression.fit(_round_codes(groups, scale, offset, bits, out=codes))
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, scale, best_scale)
            best_offset = torch.where(better, offset, best_offset)
    return best_scale, best_offset


class _Regression:
    """Weighted regression of weights on their codes, per group.

    Its buffers are made once for all codes: fresh memory for every step would cost several times what the step does.

    Args:
        groups: weights, ``[rows, K/g, g]``.
        moment: weights of the squares, ``[1, K/g, g]``.
    """

    def __init__(self, groups: Tensor, moment: Tensor) -> None:
        """Centre the weights."""
        self._moment = moment
        self._moment_sum = moment.double().sum(-1)
        self._products = groups * moment
        self._mean_value = self._products.sum(-1, dtype=torch.float64) / self._moment_sum
        self._centred_value = groups - self._mean_value.float()[..., None]
        self._weighted_code = torch.empty_like(groups)

    def fit(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope, intercept and explained error (float64), each ``[rows, K/g]``; ``codes`` are overwritten.

        The error left is the weighted variance of the group, the same for all codes, minus what the codes explain.
        """
        mean_code = self._weighted_sum(codes, self._moment) / self._moment_sum
        centred_code = codes.sub_(mean_code.float()[..., None])
        weighted_code = torch.mul(centred_code, self._moment, out=self._weighted_code)
        variance = self._weighted_sum(weighted_code, centred_code)
        covariance = self._weighted_sum(weighted_code, self._centred_value)
        slope = torch.where(variance > 0, covariance / variance.clamp_min(1e-300), 0.0)
        return slope.float(), (self._mean_value - slope * mean_code).float(), slope * covariance

    def _weighted_sum(self, values: Tensor, weights: Tensor) -> Tensor:
        return torch.mul(values, weights, out=self._products).sum(-1, dtype=torch.float64)


def _round_codes(groups: Tensor, scale: Tensor, offset: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Nearest codes, float32 in [0, 2^bits - 1]; 0 where the scale is 0."""
    safe_scale = torch.where(scale == 0, torch.inf, scale)
    centred = torch.sub(groups, offset[..., None], out=out)
    return centred.div_(safe_scale[..., None]).round_().clamp_(0, 2**bits - 1)


def _double_quantize(groups: Tensor, scale: Tensor, offset: Tensor, weight_format: WeightFormat) -> QuantizedWeight:
    """Put scales and offsets on 8-bit grids, then round the weights to what is really decoded."""
    scale_codes, scale_base = _to_grid(scale)
    offset_codes, offset_base = _to_grid(offset)
    all_codes = torch.stack((scale_codes, offset_codes))
    all_base = torch.stack((scale_base, offset_base)).view(torch.uint8)
    scale, offset = decode_scale_codes(all_codes, all_base)
    shape = groups.shape[:2]
    codes = _round_codes(groups, scale.view(shape), offset.view(shape), weight_format.bits)
    packed = pack_codes(codes.to(torch.uint8), weight_format.bits)
    return QuantizedWeight(weight_format, packed, all_codes, all_base)


def _to_grid(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit linear codes of ``[G]`` values, and (minimum, step) of each 256, bfloat16 ``[S, 2]``.

    bfloat16 keeps float32's range, so weights of any magnitude survive; the step is rounded up to cover the range.
    """
    padding = -values.numel() % SUPERBLOCK_GROUPS
    blocks = torch.cat((values, values[-1:].expand(padding))).view(-1, SUPERBLOCK_GROUPS)
    minimum = blocks.amin(-1)
    minimum = torch.minimum(minimum, minimum.bfloat16().float())
    minimum = (minimum - minimum.abs() * 2**-8).bfloat16()
    step = ((blocks.amax(-1) - minimum.float()) / 255 * (1 + 2**-7)).bfloat16()
    safe_step = torch.where(step == 0, torch.inf, step.float())
    codes = ((blocks - minimum.float()[:, None]) / safe_step[:, None]).round().clamp(0, 255).to(torch.uint8)
    return codes.view(-1)[: values.numel()], torch.stack((minimum, step), dim=-1)


def _quantize_symmetric(weight: Tensor, weight_format: WeightFormat) -> QuantizedWeight:
    """8 bits: one bfloat16 scale per group, rounded up so that the largest value is not clipped."""
    groups = weight.reshape(-1, weight_format.group_size)
    scale = (groups.abs().amax(-1) / 127 * (1 + 2**-8)).bfloat16()
    safe_scale = torch.where(scale == 0, torch.inf, scale.float())
    codes = ((groups / safe_scale[:, None]).round() + 128).clamp(0, 255).to(torch.uint8)
    empty = torch.empty(0, dtype=torch.uint8, device=weight.device)
    return QuantizedWeight(weight_format, pack_codes(codes, SYMMETRIC_BITS), empty, scale.view(torch.uint8))
