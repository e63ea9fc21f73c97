"""Module names as a grid."""

from __future__ import annotations

import pytest

from peft_autoqra.plan_grid import PlanGrid

LLAMA = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
VIT = ["attention.attention.query", "attention.output.dense", "intermediate.dense", "output.dense"]
T5 = ["layer.0.SelfAttention.q", "layer.1.DenseReluDense.wi"]
T5_DECODER = ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "layer.2.DenseReluDense.wi"]


def in_layers(stack: str, kinds: list[str], num_layers: int = 2) -> list[str]:
    return [f"{stack}.{layer}.{kind}" for layer in range(num_layers) for kind in kinds]


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (in_layers("model.layers", LLAMA), ("0", "1"), ("q_proj", "o_proj", "down_proj")),
        (
            in_layers("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]),
            ("0", "1"),
            ("c_attn", "attn.c_proj", "mlp.c_proj"),
        ),
        (
            [*in_layers("vit.encoder.layer", VIT), "classifier"],
            ("0", "1", "other"),
            ("query", "attention.output.dense", "intermediate.dense", "output.dense", "classifier"),
        ),
        (
            in_layers("encoder.block", T5) + in_layers("decoder.block", T5_DECODER),
            ("encoder 0", "encoder 1", "decoder 0", "decoder 1"),
            ("SelfAttention.q", "wi", "EncDecAttention.q"),
        ),
        (in_layers("a", ["x"]) + in_layers("a.b", ["x"]), ("a 0", "a 1", "b 0", "b 1"), ("x",)),
        (in_layers("layers", ["experts.0.w", "experts.1.w"]), ("0", "1"), ("0.w", "1.w")),
        (["0.weight_net", "1.weight_net"], ("0", "1"), ("weight_net",)),
        (["up", "down"], ("other",), ("up", "down")),
    ],
)
def test_rows_are_layers_and_columns_are_types(names, rows, columns):
    grid = PlanGrid.from_names(names)
    assert (grid.row_labels, grid.columns) == (rows, columns)
    assert sorted(grid.cells.values()) == sorted(names)


def test_layers_are_ordered_by_number_whatever_the_order_of_the_names():
    names = in_layers("model.layers", ["q"], num_layers=12)
    grid = PlanGrid.from_names(sorted(names))
    assert grid.row_labels == tuple(str(layer) for layer in range(12))
    assert [grid.cells[row, 0] for row in range(12)] == names
