"""All methods by name."""

from __future__ import annotations

from benchmarks.finetune.method import Allocator, Method
from benchmarks.finetune.methods import adalora, eva, loftq, lora, qlora
from benchmarks.finetune.methods.autoqra import AutoQRA, AutoQRAAllocation
from benchmarks.finetune.methods.autoround import AutoRound
from benchmarks.finetune.methods.published import Published
from benchmarks.finetune.methods.sequential import Sequential
from benchmarks.finetune.methods.uniform import Uniform
from benchmarks.finetune.methods.uniform_like import UniformLike
from benchmarks.finetune.plan_method import PlanMethod

SHORT_COST = 3.0
"""Of searches, where the fine-tune is so short that calibration costs more than one."""

_ALLOCATORS: tuple[Allocator, ...] = (
    AutoQRA(),
    AutoQRA(max_cost=SHORT_COST),
    AutoQRA(quantizer="gptq"),
    AutoQRA(quantizer="gptq", max_cost=SHORT_COST),
    AutoQRAAllocation(),
    Published(),
    Published(max_cost=SHORT_COST),
    Sequential(),
    AutoRound(),
    Uniform(),
    Uniform(calibrated=False),
    UniformLike(),
    UniformLike(calibrated=False),
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *lora.METHODS,
        *qlora.METHODS,
        *loftq.METHODS,
        *adalora.METHODS,
        *eva.METHODS,
        *map(PlanMethod, _ALLOCATORS),
    )
}
