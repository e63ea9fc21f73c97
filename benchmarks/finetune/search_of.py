"""The search of a setting and budget, and what allocators take from it: model, tables, calibration, plans."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.method import NotApplicable
from benchmarks.finetune.setting import Setting
from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher, LayerPlan, MemoryModel
from peft_autoqra.errors import UnreachableBudgetError
from peft_autoqra.importance.calibration import CalibrationOptions, calibrate
from peft_autoqra.importance.calibration_bank import CalibrationBank
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_setup import SearchSetup


def searcher_of(setting: Setting, budget: str, output_dir: Path, **settings: Any) -> AutoQRASearcher:
    """The search that a user would start: plans are chosen on the development split, with the middle learning rate.

    Args:
        setting: model, task and recipe.
        budget: as :func:`benchmarks.finetune.budget.limit_of` takes it.
        output_dir: of the search; nothing is written before it runs.
        settings: of :class:`~peft_autoqra.AutoQRASearchConfig`, where they are not the defaults.

    Raises:
        NotApplicable: the budget leaves no room for an adapter.
    """
    model, args = setting.load_base(), setting.recipe.sft_config(output_dir / "sft")
    limit = limit_of(budget, MemoryModel.from_model(model, optimizer=str(getattr(args.optim, "value", args.optim))))
    try:
        return AutoQRASearcher(
            model,
            train_dataset=setting.task.train,
            eval_dataset=setting.task.dev,
            args=args,
            search_config=AutoQRASearchConfig(
                memory_budget=str(limit.limit_bytes),
                scope=limit.scope,
                output_dir=str(output_dir),
                cache_dir=str(setting.folder / "calibration"),
                **settings,
            ),
            processing_class=setting.tokenizer,
            show_progress=False,
        )
    except UnreachableBudgetError as error:
        raise NotApplicable(str(error)) from error


@dataclass(frozen=True)
class Calibrated:
    """A search whose model is calibrated, for allocators that choose without it.

    Attributes:
        setup: of the search.
        bank: scores, quantized weights and initial adapters.
        seconds: that calibration takes, also where it was found in the cache.
    """

    setup: SearchSetup
    bank: CalibrationBank
    seconds: float

    @classmethod
    def of(cls, searcher: AutoQRASearcher) -> Calibrated:
        """Calibrate what the cache lacks, and remember beside it how long that took.

        Quantizers share the statistics, and plans with fewer bit-widths need a part of a bank, so both are timed
        apart, and a bank for each bit-width.
        """
        setup, folder = searcher.setup, searcher.cache_dir
        names, options = setup.bank_settings.module_names, CalibrationOptions(directory=folder)
        fingerprint = setup.statistics_fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        _, measuring = _timed(
            folder / f"statistics-{fingerprint}.seconds",
            lambda: calibrate(setup.model, setup.calibration_batches, names, options, fingerprint=fingerprint),
        )
        num_bits = len(setup.bank_settings.bit_choices)
        bank, fitting = _timed(
            folder / f"bank-{setup.bank_settings.fingerprint(fingerprint)}.seconds", searcher.calibrate, per=num_bits
        )
        return cls(setup, bank, measuring + fitting)

    @cached_property
    def problem(self) -> SearchProblem:
        """All choices of the search with their bytes and scores."""
        return self.setup.problem_with(self.setup.loss_table(self.bank))

    def save(self, layers: Mapping[str, LayerPlan], folder: Path, name: str, **provenance: Any) -> None:
        """Write the plan of these layers; quantizer, calibration and start are those of the search's plans.

        Args:
            layers: bits and rank of every targeted module.
            folder: is made.
            name: of the allocator.
            provenance: what else the plan should tell of its making.
        """
        plan = self.setup.plan(layers, self.setup.quantizer, compensate=True)
        plan.replace(
            calibration=self.bank.for_layers(plan), provenance={"allocator": name, **provenance}
        ).save_pretrained(folder)


def save_without_data(
    setup: SearchSetup, layers: Mapping[str, LayerPlan], folder: Path, name: str, **provenance: Any
) -> None:
    """Write the plan of these layers as :meth:`Calibrated.save`, but quantized without data and started at zero."""
    plan = setup.plan(layers, setup.quantizer, compensate=False)
    plan.replace(provenance={"allocator": name, **provenance}).save_pretrained(folder)


def _timed(record: Path, action: Callable[[], Any], *, per: int = 1) -> tuple[Any, float]:
    """The result of an action, and its seconds when it was first done.

    Args:
        record: keeps the seconds.
        action: finds its own result again the next time.
        per: parts of equal length that the action has; the record is of one.
    """
    start = time.perf_counter()
    result = action()
    seconds = (time.perf_counter() - start) / per
    if not record.exists():
        partial = record.with_suffix(f".{os.getpid()}")  # another process may write the same record
        partial.write_text(f"{seconds}\n", encoding="utf-8")
        partial.replace(record)
    return result, per * float(record.read_text("utf-8"))
