"""Methods that choose a plan, once for all learning rates and seeds."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from peft import get_peft_model
from trl import SFTConfig

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.method import Allocator, NotApplicable, Prepared, Spent
from benchmarks.finetune.setting import Setting
from peft_autoqra import AutoQRAConfig, BitRankPlan, MemoryModel

SPENT_FILE = "spent.json"


class AllocationUnderWay(Exception):
    """Another process chooses this plan just now."""


@dataclass(frozen=True)
class PlanMethod:
    """Trains the plan of an allocator with this package.

    Attributes:
        allocator: asked once for a setting and budget; its plan is kept in the setting's folder.
    """

    allocator: Allocator
    needs_budget: bool = True

    @property
    def name(self) -> str:
        """The allocator's."""
        return self.allocator.name

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Quantize by the plan; the seed reaches what calibration leaves random.

        Raises:
            AllocationUnderWay: by another process.
            NotApplicable: nothing fits the budget.
        """
        if budget is None:
            raise NotApplicable(f"{self.name} needs a budget.")
        folder = self.plan_folder(setting, budget)
        spent = self._allocated(setting, budget, folder)
        torch.manual_seed(args.seed)  # a search draws numbers; a plan that was found does not
        plan = BitRankPlan.from_pretrained(folder)
        base = setting.load_base()
        memory_model = MemoryModel.from_model(base)
        predicted = memory_model.estimate(plan)
        check_budget(self.name, predicted.in_scope(limit_of(budget, memory_model).scope), budget, memory_model)
        model = get_peft_model(base, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
        return Prepared(
            model=model,
            predicted=predicted,
            module_names=tuple(plan),
            mean_bits=plan.average_bits,
            mean_rank=float(np.mean([layer.rank for layer in plan.values()])),
            spent=spent,
        )

    def plan_folder(self, setting: Setting, budget: str) -> Path:
        """Where the plan is kept."""
        return setting.folder / f"{self.name}-{re.sub(r'[^a-z0-9.]+', '-', budget)}"

    def _allocated(self, setting: Setting, budget: str, folder: Path) -> Spent:
        known = folder / SPENT_FILE
        if not known.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(f"{folder}.lock", timeout=0):
                    if not known.exists():
                        self._allocate(setting, budget, folder)
            except Timeout:
                raise AllocationUnderWay(str(folder)) from None
        return Spent(**json.loads(known.read_text("utf-8")))

    def _allocate(self, setting: Setting, budget: str, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        spent = self.allocator.allocate(setting, budget, folder)
        partial = folder / f"{SPENT_FILE}.partial"
        partial.write_text(json.dumps(asdict(spent)), encoding="utf-8")
        partial.replace(folder / SPENT_FILE)  # at once: whoever sees the file takes the plan as whole


def check_budget(name: str, num_bytes: int, budget: str, memory_model: MemoryModel) -> None:
    """Refuse a plan that takes more than its budget.

    Raises:
        NotApplicable: it does.
    """
    limit = limit_of(budget, memory_model).limit_bytes
    if num_bytes > limit:
        raise NotApplicable(f"{name} takes {num_bytes:,} bytes, the budget {budget} is {limit:,}.")
