"""JSON documents."""

from __future__ import annotations

import json
import math

import pytest

from peft_autoqra.commands.outcome import SCHEMA_VERSION, error_document, outcome_document


def test_numbers_that_are_not_finite_are_null():
    data = {"losses": (1.5, math.nan, [math.inf]), "by": {2: -math.inf}, "name": "é"}
    document = json.loads(outcome_document("search", data), parse_constant=pytest.fail)
    assert document == {
        "schema_version": SCHEMA_VERSION,
        "command": "search",
        "losses": [1.5, None, [None]],
        "by": {"2": None},
        "name": "é",
    }


def test_messages_are_one_line():
    error = json.loads(error_document(None, ValueError("two\n  lines"), 2))["error"]
    assert error == {"type": "ValueError", "message": "two lines", "exit_code": 2}
