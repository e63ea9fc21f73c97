"""The same bits and rank everywhere: the best such plan of a budget by the scores, calibrated or not."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finetune.method import NotApplicable, Spent
from benchmarks.finetune.search_of import Calibrated, save_without_data, searcher_of
from benchmarks.finetune.setting import Setting
from peft_autoqra.importance.warm_starts import best_uniform


@dataclass(frozen=True)
class Uniform:
    """The best uniform plan within the budget by the scores that the search has.

    Attributes:
        calibrated: quantize by calibration and start at the correction; else the same bits and rank are quantized
            without data and adapters start at zero, as QLoRA would with these bits.
    """

    calibrated: bool = True

    @property
    def name(self) -> str:
        """``"uniform"`` or ``"uniform-zero"``."""
        return "uniform" if self.calibrated else "uniform-zero"

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Write the plan.

        Raises:
            NotApplicable: no uniform plan with an adapter is within the budget.
        """
        calibrated = Calibrated.of(searcher_of(setting, budget, folder))
        start = time.perf_counter()
        candidate = best_uniform(calibrated.problem)
        if candidate is None:
            raise NotApplicable(f"No uniform plan with an adapter is within {budget}.")
        layers = calibrated.problem.space.decode(candidate)
        if self.calibrated:
            calibrated.save(layers, folder, self.name)
        else:
            save_without_data(calibrated.setup, layers, folder, self.name)
        seconds = calibrated.seconds + time.perf_counter() - start
        return Spent(seconds=seconds, cost=calibrated.setup.costs.calibration)
