"""This package: its search as users start it, and its exact allocation alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.finetune.method import Spent
from benchmarks.finetune.search_of import Calibrated, searcher_of
from benchmarks.finetune.setting import Setting
from peft_autoqra.importance.warm_starts import best_allocation


@dataclass(frozen=True)
class AutoQRA:
    """The search with the defaults that users get.

    Attributes:
        quantizer: ``"native"`` or ``"gptq"``.
        max_cost: of the search, calibration included, in full fine-tunes.
    """

    quantizer: Literal["native", "gptq"] = "native"
    max_cost: float = 1.0

    @property
    def name(self) -> str:
        """``"autoqra"`` or ``"autoqra-gptq"``; the cost follows where it is not the default: ``"autoqra-cost3"``."""
        return f"{_named('autoqra', self.quantizer)}{'' if self.max_cost == 1 else f'-cost{self.max_cost:g}'}"

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Search in a folder beside the plan's, where a search that was stopped goes on.

        Raises:
            NotApplicable: the budget leaves no room for an adapter.
            SearchBudgetError: ``max_cost`` does not suffice for the baselines.
        """
        search = folder.with_name(f"{folder.name}-search")
        searcher = searcher_of(setting, budget, search, quantizer=self.quantizer, max_cost=self.max_cost)
        searcher.setup.ladder()  # refuses before anything long runs
        calibration_seconds = Calibrated.of(searcher).seconds
        result = searcher.run()
        result.plan.save_pretrained(folder)
        return Spent(
            seconds=calibration_seconds + result.seconds,  # which holds the time to read the calibration
            trials=len(result.trials),
            cost=result.cost,
        )


@dataclass(frozen=True)
class AutoQRAAllocation:
    """The exact allocation of the scores: what the search starts from, without a trial.

    Attributes:
        quantizer: ``"native"`` or ``"gptq"``.
    """

    quantizer: Literal["native", "gptq"] = "native"

    @property
    def name(self) -> str:
        """``"autoqra-allocation"`` or ``"autoqra-allocation-gptq"``."""
        return _named("autoqra-allocation", self.quantizer)

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Write the plan.

        Raises:
            NotApplicable: the budget leaves no room for an adapter.
        """
        calibrated = Calibrated.of(searcher_of(setting, budget, folder, quantizer=self.quantizer))
        start = time.perf_counter()
        problem = calibrated.problem
        calibrated.save(problem.space.decode(best_allocation(problem)), folder, self.name)
        seconds = calibrated.seconds + time.perf_counter() - start
        return Spent(seconds=seconds, cost=calibrated.setup.costs.calibration)


def _named(name: str, quantizer: str) -> str:
    return name if quantizer == "native" else f"{name}-{quantizer}"
