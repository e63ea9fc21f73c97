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
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_WEIGHT)].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name}:{tuple(weight.shape)}:".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
