"""Which modules share one decision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.memory import ModuleShape
from peft_autoqra.search_space import ModuleGroup, SearchSpace

Granularity = Literal["module", "fused", "block", "layer"]

_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def build_search_space(
    modules: Mapping[str, ModuleShape],
    granularity: Granularity,
    bit_choices: Iterable[int],
    rank_choices: Iterable[int],
) -> SearchSpace:
    """Group modules and pair the groups with the choices.

    Args:
        modules: module name to shape.
        granularity: ``"module"`` decides each module on its own; ``"fused"`` ties q, k, v and gate, up, which vLLM
            serves as one weight each; ``"block"`` ties the modules of one parent (attention, MLP); ``"layer"`` ties
            those of one decoder layer, as the paper does.
        bit_choices: any order.
        rank_choices: any order.

    Raises:
        InvalidPlanError: unknown granularity or choices that no plan can hold.
    """
    if granularity not in get_args(Granularity):
        raise InvalidPlanError(f"granularity={granularity!r} is unknown; use one of {get_args(Granularity)}.")
    members: dict[str, list[str]] = {}
    for name in modules:
        members.setdefault(_group_name(name, granularity), []).append(name)
    groups = tuple(
        ModuleGroup(group_name, tuple(names), min(min(modules[n].out_features, modules[n].in_features) for n in names))
        for group_name, names in members.items()
    )
    return SearchSpace(groups, tuple(sorted(set(bit_choices))), tuple(sorted(set(rank_choices))))


def _group_name(module_name: str, granularity: Granularity) -> str:
    parent, _, child = module_name.rpartition(".")
    if granularity == "module":
        return module_name
    if granularity == "fused":
        return f"{parent}.{_FUSED.get(child, child)}"
    if granularity == "block":
        return parent or module_name
    layer = re.match(r".*?\.\d+(?=\.|$)", module_name)
    return layer.group() if layer else module_name
