"""Plans in folders, and the documentation of the command line."""

from __future__ import annotations

import re

from peft_autoqra import BaseModelInfo, BitRankPlan, LayerPlan, MemoryEstimate
from tests.conftest import REPOSITORY

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.down_proj": (64, 128)}


def layered_plan(
    changes: dict[str, LayerPlan] | None = None, *, num_layers: int = 4, weight_bytes: int = 4000, **arguments
) -> BitRankPlan:
    """4 bits and rank 16 but for the changes."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(num_layers) for kind in KINDS]
    return BitRankPlan(
        {name: LayerPlan(4, 16) for name in names} | (changes or {}),
        shapes={name: SHAPES[name.split(".", 3)[3]] for name in names},
        base_model=BaseModelInfo(
            name_or_path="me/base", revision="abc", fingerprint=arguments.pop("fingerprint", "f1")
        ),
        memory=MemoryEstimate(
            weight_bytes=weight_bytes,
            metadata_bytes=100,
            untouched_bytes=2000,
            adapter_bytes=300,
            gradient_bytes=300,
            optimizer_bytes=600,
        ),
        **arguments,
    )


def documentation() -> str:
    return (REPOSITORY / "docs" / "command-line.md").read_text(encoding="utf-8")


def documented_keys(command: str) -> set[str]:
    """Keys of a command's JSON document, those that all have included."""
    section = documentation().split("## JSON")[1].split("\n## ")[0]
    row = re.search(rf"^\| `{re.escape(command)}`? \| ([^;\n]*)", section, re.MULTILINE).group(
        1
    )  # up to special cases
    return {"schema_version", "command", *re.findall(r"`(\w+)`", row)}
