"""The table of a plan."""

from __future__ import annotations

import re

import numpy as np
import pytest

from peft_autoqra.plan import LayerPlan
from peft_autoqra.plan_table import plan_table

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_layers(num_layers: int, num_choices: int = 30) -> dict[str, LayerPlan]:
    rng = np.random.default_rng(0)
    choices = [LayerPlan(bits, rank) for bits in (2, 3, 4, 8, 16) for rank in (4, 0, 8, 16, 32, 64)][:num_choices]
    return {
        f"model.layers.{layer}.{kind}": choices[rng.integers(len(choices))]
        for layer in range(num_layers)
        for kind in KINDS
    }


def parse(table: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(layer, column) to bits and rank, with rows of several layers taken apart."""
    lines = [line.strip("| ") for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split(" |")] for line in lines]
    cells = {}
    for label, *row in rows[2:]:
        first, last = re.fullmatch(r"(\d+)(?:-(\d+))?", label).groups()
        for layer in range(int(first), int(last or first) + 1):
            for column, cell in zip(rows[0][1:], row, strict=True):
                bits, rank = cell.split("/")
                assert (str(layer), column) not in cells
                cells[str(layer), column] = (int(bits), int(rank))
    return cells


@pytest.mark.parametrize(("num_layers", "num_choices"), [(2, 30), (32, 30), (80, 30), (80, 1), (12, 2)])
def test_the_table_is_the_plan(num_layers, num_choices):
    layers = random_layers(num_layers, num_choices)
    expected = {tuple(name.split(".")[2:]): (layer.bits, layer.rank) for name, layer in layers.items()}
    assert parse(plan_table(layers)) == expected


def test_equal_neighbours_share_a_row():
    layers = {f"model.layers.{i}.{kind}": LayerPlan(4 if i < 70 else 8, 16) for i in range(80) for kind in KINDS}
    lines = plan_table(layers).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| layer (bits/rank)", "| ---", "| 0-69", "| 70-79"]


def test_layers_that_the_plan_leaves_out_end_a_row():
    layers = {f"model.layers.{i}.q_proj": LayerPlan(4, 16) for i in (0, 1, 3)}
    assert [line.split(" | ")[0] for line in plan_table(layers).splitlines()[2:]] == ["| 0-1", "| 3"]


def test_many_different_layers_are_folded_away():
    assert plan_table(random_layers(32)).startswith("| layer")
    assert plan_table(random_layers(80)).startswith("<details><summary>80 rows")


def test_without_any_adapter_cells_are_bits():
    table = plan_table({"model.layers.0.q_proj": LayerPlan(3, 0), "lm_head": LayerPlan(8, 0)})
    assert table.splitlines()[2:] == ["| 0 | 3 |  |", "| other |  | 8 |"]


def test_a_layer_for_every_expert_is_counted_by_type():
    layers = {
        f"model.layers.{i}.mlp.experts.{e}.{kind}": LayerPlan(2 if e else 4, 8)
        for i in range(2)
        for e in range(16)
        for kind in ("w1", "w2")
    }
    assert plan_table(layers).splitlines()[2:] == [
        r"| model.layers.\*.mlp.experts.\*.w1 | 32 | 2-4 | 8 |",
        r"| model.layers.\*.mlp.experts.\*.w2 | 32 | 2-4 | 8 |",
    ]


def test_names_are_text_and_no_markup():
    table = plan_table({"model.layers.0.<img src=x>": LayerPlan(3, 0), "lm`_`|![x](y": LayerPlan(8, 0)})
    assert table.splitlines()[0] == r"| layer (bits) | &lt;img src=x&gt; | lm\`_\`\|!\[x](y |"
