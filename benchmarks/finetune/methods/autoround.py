"""AutoRound's mixed-bit allocation, then one rank everywhere.

Bits are those of AutoRound's own AutoScheme, as scripts/allocate_autoround.py wrote them in an environment of its own;
quantizer, calibration and compensated start are those of the other plans, so that the allocation alone differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.method import NotApplicable, Spent
from benchmarks.finetune.plan_method import NUM_CALIBRATION_SEQUENCES, write_plan
from benchmarks.finetune.setting import Setting
from peft_autoqra import LayerPlan, MemoryModel
from peft_autoqra.evaluation.sft import mean_length
from peft_autoqra.memory import MemoryBudget
from peft_autoqra.plan import DENSE_BITS
from peft_autoqra.search_costs import SearchCosts, fit_tokens

ALLOCATIONS = Path(__file__).parents[1] / "autoround"
RANKS = (16, 8, 4)
LEAST_BITS = 3
SCORING_PASSES = 2
"""Training tokens that a scored token costs: forward, then block by block forward again and backward, and gradients
of the weights."""


@dataclass(frozen=True, kw_only=True)
class AutoRoundBits:
    """What scripts/allocate_autoround.py wrote.

    Attributes:
        layouts: bits by module, one mapping for every average width that was asked for.
        seconds: one allocation takes, scoring included.
        scored_tokens: tokens passed through the model, all options together.
    """

    layouts: tuple[Mapping[str, int], ...]
    seconds: float
    scored_tokens: int

    @classmethod
    def read(cls, path: Path) -> AutoRoundBits:
        """From a file.

        Raises:
            NotApplicable: there is none; the message tells how it is made.
        """
        if not path.exists():
            raise NotApplicable(f"{path} is missing; scripts/allocate_autoround.py --output {path} writes it.")
        content = json.loads(path.read_text("utf-8"))
        scored = sum(bits != DENSE_BITS for bits in content["options"])
        return cls(
            layouts=tuple(
                dict(zip(content["modules"], allocation["bits"], strict=True))
                for allocation in content["allocations"]
            ),
            seconds=content["seconds"],
            scored_tokens=scored * content["num_sequences"] * content["sequence_length"],
        )

    def within(self, budget: MemoryBudget, memory_model: MemoryModel) -> dict[str, LayerPlan]:
        """The allocation that comes nearest to a budget from below.

        The rank is 16, or the largest below it with which every module could have 3 bits; where none leaves that much,
        the smallest.

        Args:
            budget: in bytes.
            memory_model: of the model that the bits are for.

        Raises:
            NotApplicable: no allocation is within it, or the bits are of other modules.
        """
        if set(self.layouts[0]) != set(memory_model.modules):
            raise NotApplicable("AutoRound's allocation is of other modules than those that are fine-tuned.")

        def num_bytes(layers: Mapping[str, LayerPlan]) -> int:
            return memory_model.estimate(layers).in_scope(budget.scope)

        roomy = (r for r in RANKS if num_bytes(memory_model.uniform(LEAST_BITS, r)) <= budget.limit_bytes)
        adapters = memory_model.uniform(LEAST_BITS, next(roomy, RANKS[-1]))
        plans = [{name: LayerPlan(bits[name], adapters[name].rank) for name in adapters} for bits in self.layouts]
        fitting = [plan for plan in plans if num_bytes(plan) <= budget.limit_bytes]
        if not fitting:
            raise NotApplicable(f"None of AutoRound's allocations is within {budget.limit_bytes:,} bytes.")
        return max(fitting, key=num_bytes)


@dataclass(frozen=True)
class AutoRound:
    """Bits by AutoRound, a rank for all, the start compensated.

    Attributes:
        directory: of the allocations, a file for each model and task.
    """

    directory: Path = ALLOCATIONS
    name: str = "autoround"

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Write the plan.

        Raises:
            NotApplicable: AutoRound did not run on this model and task, or nothing it found is within the budget.
        """
        chosen = AutoRoundBits.read(self.directory / f"{Path(setting.model_id).name}-{setting.task_name}.json")
        memory_model = MemoryModel.from_model(setting.load_base())
        layers = chosen.within(limit_of(budget, memory_model), memory_model)
        start = time.perf_counter()
        write_plan(setting, layers, folder)
        seconds = chosen.seconds + time.perf_counter() - start
        return Spent(seconds=seconds, cost=_cost(setting, memory_model, chosen.scored_tokens))


def _cost(setting: Setting, memory_model: MemoryModel, scored_tokens: int) -> float:
    train, recipe = setting.data.train, setting.recipe
    step_tokens = recipe.batch_size * mean_length(train)
    shapes = [(shape.out_features, shape.in_features) for shape in memory_model.modules.values()]
    calibration = SearchCosts(
        full_steps=recipe.max_steps,
        step_tokens=step_tokens,
        eval_tokens=0,
        calibration_tokens=min(NUM_CALIBRATION_SEQUENCES, len(train)) * mean_length(train),
        fit_tokens=fit_tokens(shapes, num_bits=1),
    ).calibration
    return calibration + SCORING_PASSES * scored_tokens / (step_tokens * recipe.max_steps)
