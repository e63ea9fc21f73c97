"""The plan that gives every module the same bits and rank."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peft_autoqra.memory import MemoryModel
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, QuantizerSettings


def uniform_plan(
    model: nn.Module,
    bits: int,
    rank: int,
    *,
    target_modules: str | Iterable[str] = "all-linear",
    quantizer: QuantizerSettings | None = None,
) -> BitRankPlan:
    """The same bits and rank for every targeted linear layer; calibrate it with ``calibrate_plan``.

    Example:
        ```python
        plan = uniform_plan(base, bits=3, rank=16)
        print(plan.memory.stored_bytes)
        ```

    Args:
        model: unquantized.
        bits: 2, 3, 4, 8 or 16.
        rank: capped at the smaller side of each weight.
        target_modules: as in ``LoraConfig``.
        quantizer: native with groups of 64 by default.

    Raises:
        InvalidPlanError: unsupported bits or rank, or nothing matches.
    """
    memory_model = MemoryModel.from_model(model, target_modules=target_modules)
    layers = memory_model.uniform(bits, rank)
    return BitRankPlan(
        layers,
        shapes={name: (shape.out_features, shape.in_features) for name, shape in memory_model.modules.items()},
        quantizer=quantizer,
        base_model=BaseModelInfo(name_or_path=getattr(getattr(model, "config", None), "name_or_path", None)),
        memory=memory_model.estimate(layers, quantizer),
    )
