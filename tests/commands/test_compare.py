"""``autoqra compare``."""

from __future__ import annotations

import json
import re

import pytest

from peft_autoqra import BitRankPlan, LayerPlan, QuantizerSettings, cli
from tests.commands.plans import documented_keys, layered_plan

CHANGES = {
    "model.layers.2.mlp.down_proj": LayerPlan(8, 0),
    "model.layers.3.self_attn.q_proj": LayerPlan(2, 16),
    "model.layers.3.self_attn.v_proj": LayerPlan(4, 8),
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)  # short names
    layered_plan().save_pretrained("a")
    layered_plan(CHANGES, weight_bytes=5500).save_pretrained("b")
    return "a", "b"


def compare(capsys, *argv: str) -> str:
    assert cli.main(["compare", *argv]) == 0
    return capsys.readouterr().out


def test_differences_are_counted_and_signed(capsys, folders):
    text = compare(capsys, *folders)
    assert re.search(r"^weights, bytes +4,000 +5,500 +\+1,500$", text, re.MULTILINE)
    assert "3 of 12 modules of both differ." in text
    assert "bits  4 to 2: 1, 4 to 8: 1, same: 10" in text
    assert "rank  16 to 0: 1, 16 to 8: 1, same: 10" in text
    grid = {line.split()[0]: line.split()[1:] for line in text.split("\nlayer ")[1].splitlines()[1:4]}
    assert grid == {"0-1": [".", ".", "."], "2": [".", ".", "+4/-16"], "3": ["-2/+0", "+0/-8", "."]}
    listed = re.findall(r"^(model\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert listed == [
        ("model.layers.2.mlp.down_proj", "4/16", "8/0", "+4,096", "-3,072"),  # 4 bits of 64 x 128 weights
        ("model.layers.3.self_attn.q_proj", "4/16", "2/16", "-1,024", "+0"),
        ("model.layers.3.self_attn.v_proj", "4/16", "4/8", "+0", "-768"),
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_the_other_way_round_signs_turn(capsys, folders):
    there, back = (json.loads(compare(capsys, *order, "--json")) for order in (folders, folders[::-1]))
    assert there.keys() == documented_keys("compare")
    for one, other in zip(there["changed_modules"], back["changed_modules"], strict=True):
        assert one["name"] == other["name"]
        assert (one["first"], one["second"]) == (other["second"], other["first"])
        assert one["weight_bytes"] == -other["weight_bytes"]
        assert one["adapter_parameters"] == -other["adapter_parameters"]
    assert {"first": 4, "second": 8, "num_modules": 1} in there["bits_changes"]
    assert sum(change["num_modules"] for change in there["rank_changes"]) == 12
    assert (there["same"], there["same_base_weights"]) == (False, True)


def test_the_same_plan(capsys, folders):
    assert "All 12 modules of both have the same bits and ranks." in compare(capsys, folders[0], folders[0])
    assert json.loads(compare(capsys, folders[0], folders[0], "--json"))["same"] is True


def test_other_quantizers_weights_and_modules_are_said(capsys, tmp_path, folders):
    other = layered_plan(num_layers=5, fingerprint="f2", quantizer=QuantizerSettings(group_size=32))
    other.save_pretrained(tmp_path / "c")
    text = compare(capsys, folders[0], str(tmp_path / "c"))
    assert "different weights" in text
    assert "group_size 64" in text
    assert "group_size 32" in text
    assert "Only B plans 3 modules, such as model.layers.4.self_attn.q_proj." in text


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (BitRankPlan({"encoder.0.dense": LayerPlan(4, 8)}), "no module in common"),
        (
            BitRankPlan(
                {"model.layers.0.mlp.down_proj": LayerPlan(4, 8)},
                shapes={"model.layers.0.mlp.down_proj": (512, 1024)},
            ),
            "(512, 1024)",
        ),
    ],
)
def test_plans_of_other_models_are_refused(capsys, tmp_path, folders, other, words):
    other.save_pretrained(tmp_path / "other")
    assert cli.main(["compare", folders[0], str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert "different models" in captured.err
    assert words in captured.err
    assert captured.out == ""
