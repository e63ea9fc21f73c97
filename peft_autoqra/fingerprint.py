"""A short hash that tells one set of base weights from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_SAMPLES_PER_WEIGHT = 256


def fingerprint_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and about 256 evenly spaced values of each weight.

    Values are hashed as float32, so that loading one checkpoint in bfloat16 or float32 makes no difference where it
    makes none to the values.

    Args:
        weights: (module name, weight ``[out_features, in_features]``) in any order.

    Returns:
        The first 32 hexadecimal digits.
    """
    return fingerprint_samples((name, tuple(weight.shape), sample_weight(weight)) for name, weight in weights)


def sample_weight(weight: Tensor) -> Tensor:
    """About 256 evenly spaced values, float32 ``[num_samples]`` on the CPU; shares no memory with the weight."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES_PER_WEIGHT)].to(device="cpu", dtype=torch.float32, copy=True)


def fingerprint_samples(samples: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """:func:`fingerprint_weights` of what :func:`sample_weight` took of each weight.

    Args:
        samples: (module name, shape of its weight, sample ``[num_samples]``) in any order.

    Returns:
        The first 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, shape, sample in sorted(samples, key=lambda item: item[0]):
        digest.update(f"{name}:{shape}:".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
