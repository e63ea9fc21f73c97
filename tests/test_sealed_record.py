"""A record that is not what was written is noticed."""

import json
import math

import pytest

from peft_autoqra.sealed_record import sealed, unsealed

RECORD = {"loss": 2.1 / 3, "nothing": None, "not finite": math.inf, "pair": (1, 2), "inner": {"b": [True], "a": "é"}}


def test_records_come_back():
    again = unsealed(json.loads(json.dumps(sealed(RECORD))))
    assert again == {**RECORD, "pair": [1, 2]}
    assert list(again) == list(RECORD)


def test_records_without_a_checksum_pass():
    assert unsealed({"loss": 1.0}) == {"loss": 1.0}


@pytest.mark.parametrize(("old", "new"), [("0.7", "0.8"), ("nothing", "anything"), ("true", "false"), (" 2", " 3")])
def test_a_change_is_noticed(old, new):
    text = json.dumps(sealed(RECORD))
    assert old in text
    with pytest.raises(ValueError, match="wrong checksum"):
        unsealed(json.loads(text.replace(old, new)))
