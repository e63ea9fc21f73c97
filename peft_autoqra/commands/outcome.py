"""What a command hands back: text for people, the same as data for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 1
"""Of the JSON documents; it rises when a key goes or changes its meaning, and not when one is added."""


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        text: what is printed.
        data: JSON-ready figures, printed in its place with ``--json``.
    """

    text: str
    data: Mapping[str, Any]


def outcome_document(command: str, data: Mapping[str, Any]) -> str:
    """The JSON document of a command that went well."""
    return _dump({"schema_version": SCHEMA_VERSION, "command": command, **data})


def error_document(command: str | None, error: BaseException, exit_code: int) -> str:
    """The JSON document of a command that failed."""
    message = " ".join(str(error).split()) or type(error).__name__
    details = {"type": type(error).__name__, "message": message, "exit_code": exit_code}
    return _dump({"schema_version": SCHEMA_VERSION, "command": command, "error": details})


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity; both become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
