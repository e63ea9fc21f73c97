"""All methods by name."""

from __future__ import annotations

from benchmarks.finetune.method import Allocator, Method
from benchmarks.finetune.methods import adalora, eva, loftq, lora, qlora
from benchmarks.finetune.methods.autoqra import AutoQRA, AutoQRAAllocation
from benchmarks.finetune.methods.published import Published
from benchmarks.finetune.methods.sequential import Sequential
from benchmarks.finetune.methods.uniform import Uniform
from benchmarks.finetune.methods.uniform_like import UniformLike
from benchmarks.finetune.plan_method import PlanMethod

_ALLOCATORS: tuple[Allocator, ...] = (
    AutoQRA(),
    AutoQRA(quantizer="gptq"),
    AutoQRAAllocation(),
    Published(),
    Sequential(),
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
