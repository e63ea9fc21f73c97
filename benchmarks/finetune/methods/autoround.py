"""AutoRound's mixed-bit allocation, then one rank everywhere.

Bits are those of AutoRound's own AutoScheme, as scripts/allocate_autoround.py wrote them in an environment of its own;
rank, quantizer, calibration and compensated start are those of the sequential allocation, so that bits alone differ.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finetune.method import NotApplicable, Spent
from benchmarks.finetune.methods.sequential import common_rank
from benchmarks.finetune.search_of import Calibrated, searcher_of
from benchmarks.finetune.setting import Setting
from peft_autoqra import LayerPlan, MemoryModel
from peft_autoqra.memory import MemoryBudget
from peft_autoqra.plan import DENSE_BITS

ALLOCATIONS = Path(__file__).parents[1] / "autoround"
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
                dict(zip(content["modules"], allocation["bits"], strict=True)) for allocation in content["allocations"]
            ),
            seconds=content["seconds"],
            scored_tokens=scored * content["num_sequences"] * content["sequence_length"],
        )

    def within(self, budget: MemoryBudget, memory_model: MemoryModel, rank: int) -> dict[str, LayerPlan]:
        """The allocation that comes nearest to a budget from below.

        Args:
            budget: in bytes.
            memory_model: of the model that the bits are for.
            rank: of every module.

        Raises:
            NotApplicable: no allocation is within it, or the bits are of other modules.
        """
        if set(self.layouts[0]) != set(memory_model.modules):
            raise NotApplicable("AutoRound's allocation is of other modules than those that are fine-tuned.")

        def num_bytes(layers: Mapping[str, LayerPlan]) -> int:
            return memory_model.estimate(layers).in_scope(budget.scope)

        ranks = {name: layer.rank for name, layer in memory_model.uniform(DENSE_BITS, rank).items()}
        plans = [{name: LayerPlan(bits[name], ranks[name]) for name in ranks} for bits in self.layouts]
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
        calibrated = Calibrated.of(searcher_of(setting, budget, folder))
        setup, start = calibrated.setup, time.perf_counter()
        layers = chosen.within(setup.budget, setup.memory_model, common_rank(calibrated.problem))
        calibrated.save(layers, folder, self.name)
        seconds = chosen.seconds + calibrated.seconds + time.perf_counter() - start
        scoring = SCORING_PASSES * chosen.scored_tokens / (setup.costs.step_tokens * setup.costs.full_steps)
        return Spent(seconds=seconds, cost=setup.costs.calibration + scoring)
