"""``autoqra show``: what a terminal and a program get."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from rich.style import Style
from transformers import AutoModelForCausalLM

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig, BitRankPlan, LayerPlan, MemoryModel, cli
from peft_autoqra.colours import BITS
from peft_autoqra.commands.show import plan_cell
from peft_autoqra.plan import SUPPORTED_BITS
from peft_autoqra.units import format_bytes
from tests.commands.plans import KINDS, documented_keys, layered_plan
from tests.tuner.synthetic import mixed_plan

CHANGES = {"model.layers.2.mlp.down_proj": LayerPlan(8, 0), "model.layers.3.self_attn.q_proj": LayerPlan(2, 64)}
ESCAPE = "\x1b["


@pytest.fixture(autouse=True)
def _small_terminal(monkeypatch, tmp_path):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)  # short names


@pytest.fixture
def folder(_small_terminal):
    layered_plan(CHANGES, provenance={"origin": "trust region", "held_out_loss": 2.5, "steps": 7}).save_pretrained(
        "plan"
    )
    return Path("plan")


def show(capsys, *argv: str) -> str:
    assert cli.main(["show", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_every_module_can_be_read_without_colour(capsys, folder):
    text = show(capsys, folder)
    assert ESCAPE not in text
    rows = {line.split()[0]: line.split()[1:] for line in text.split("layer  ")[1].splitlines()[1:4]}
    assert rows == {
        "0-1": ["4/16", "4/16", "4/16"],
        "2": ["4/16", "4/16", "8/0"],
        "3": ["2/64", "4/16", "4/16"],
    }
    assert max(map(len, text.splitlines())) <= 80
    assert "me/base at abc" in text
    assert re.search(r"found by +trust region", text)
    assert re.search(r"training +7,300", text)


@pytest.mark.parametrize(
    ("color", "environment", "coloured"),
    [
        ("auto", {}, False),
        ("auto", {"FORCE_COLOR": "1"}, True),
        ("auto", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ("always", {"NO_COLOR": "1"}, True),
        ("never", {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colour_is_a_matter_of_terminal_environment_and_flag(
    capsys, folder, monkeypatch, color, environment, coloured
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = show(capsys, folder, "--color", color)
    assert ("48;" in text) is coloured
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert [line.rstrip() for line in plain.splitlines()] == show(capsys, folder, "--color", "never").splitlines()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_bits_have_the_colours_of_the_pictures(bits):
    style = Style.parse(plan_cell({}, LayerPlan(bits, 0)).style)
    assert style.bgcolor.name == BITS[bits]
    ink, ground = (_luminance(color) for color in (style.color, style.bgcolor))
    assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 4.5  # contrast that WCAG asks of text


def _luminance(color) -> float:
    """Relative, as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color.triplet.normalized]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_json_holds_the_plan(capsys, folder):
    document = json.loads(show(capsys, folder, "--json"))
    assert document.keys() == documented_keys("show")
    assert document["kind"] == "plan"
    assert document["memory"]["total_bytes"] == 7300
    assert document["modules"]["model.layers.2.mlp.down_proj"] == {"bits": 8, "rank": 0, "shape": [64, 128]}
    layers = {name: LayerPlan(module["bits"], module["rank"]) for name, module in document["modules"].items()}
    assert BitRankPlan(layers) == BitRankPlan.from_pretrained(folder)


def test_a_search_directory_shows_its_plan(capsys, folder):
    assert f" {folder}\n" in show(capsys, ".")


def test_an_adapter_and_a_quantized_base(capsys, tiny_llama, tmp_path):
    model = tiny_llama()
    plan = mixed_plan(model)
    model.save_pretrained(tmp_path / "model")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=AutoQRAQuantConfig(plan=plan)
    )
    quantized.save_pretrained(tmp_path / "base")
    get_peft_model(quantized, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    adapter = json.loads(show(capsys, tmp_path / "adapter", "--json"))
    assert (adapter["kind"], adapter["num_modules"]) == ("adapter", len(plan))
    assert {name: (module["bits"], module["rank"]) for name, module in adapter["modules"].items()} == {
        name: (layer.bits, layer.rank) for name, layer in plan.items()
    }
    base = json.loads(show(capsys, tmp_path / "base", "--json"))
    assert base["kind"] == "quantized base"
    assert {name: module["bits"] for name, module in base["modules"].items()} == {
        name: layer.bits for name, layer in plan.items()
    }
    text = show(capsys, tmp_path / "base")
    assert "bits of every module" in text
    assert "bits/rank" not in text
    layers = [model.get_submodule(name) for name in plan]
    sizes = MemoryModel.from_model(tiny_llama().to(torch.bfloat16), target_modules=list(plan)).estimate(plan)
    words = " ".join(text.split())
    assert f"take {format_bytes(sizes.weight_bytes)} and {format_bytes(sizes.metadata_bytes)} of quantization" in words
    assert f"at 16 bits {format_bytes(sum(layer.weight.numel() for layer in layers) * 2)}" in words


def test_long_names_get_letters_and_wide_grids_go_on_below(capsys):
    kinds = [f"EncDecAttention.projection_{number}" for number in range(14)]
    plan = BitRankPlan({f"decoder.block.{layer}.{kind}": LayerPlan(3, 16) for layer in (0, 1) for kind in kinds})
    plan.save_pretrained("plan")
    text = show(capsys, "plan")
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\nlayer ") == 2
    assert text.count("3/16") == 14  # two equal layers in one row
    assert re.search(r"^  n  projection_13$", text, re.MULTILINE)
    assert "cannot be counted" in " ".join(text.split())


def test_a_layer_for_every_expert_is_counted_by_type(capsys, tmp_path):
    names = [f"model.layers.{layer}.experts.{expert}.w1" for layer in (0, 1) for expert in range(30)]
    BitRankPlan({name: LayerPlan(2 + place % 3, 8) for place, name in enumerate(names)}).save_pretrained(tmp_path)
    assert re.search(r"model\.layers\.\*\.experts\.\*\.w1 +60 +2-4 +8$", show(capsys, tmp_path), re.MULTILINE)


def test_text_of_others_cannot_steer_the_terminal(capsys, tmp_path):
    layered_plan(provenance={"origin": "\x1b]0;owned\x07 \x1b[2J"}).save_pretrained(tmp_path)
    text = show(capsys, tmp_path, "--color", "never")
    assert "owned" in text
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_named(capsys, folder, kind):
    assert kind.rpartition(".")[2] in show(capsys, folder)
