"""JSON records that carry a checksum, so that a changed digit is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_CHECKSUM = "checksum"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its checksum; JSON-ready as before."""
    return {**record, _CHECKSUM: _checksum(record)}


def unsealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it was sealed; one that was written before there were checksums passes as it is.

    Args:
        record: as JSON gave it.

    Raises:
        ValueError: it is not what was written.
    """
    content = dict(record)
    found = content.pop(_CHECKSUM, None)
    if found is not None and found != _checksum(content):
        raise ValueError("wrong checksum")
    return content


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]
