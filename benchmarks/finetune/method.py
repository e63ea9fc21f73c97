"""What the benchmark asks of a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTConfig

from benchmarks.finetune.setting import Setting
from peft_autoqra.memory_estimate import MemoryEstimate


class NotApplicable(Exception):
    """A method that cannot do what a cell asks for; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What came before training: search, calibration, initialization.

    Attributes:
        seconds: wall clock.
        trials: training runs and scores.
        cost: in full fine-tunes with the recipe, by tokens passed forward and backward.
    """

    seconds: float = 0.0
    trials: int = 0
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes:
        model: quantized base with adapters on it, in the layers of the method's own library.
        predicted: bytes by part while training, from closed forms.
        module_names: targeted modules.
        mean_bits: of the targeted weights.
        mean_rank: of the targeted modules.
        callbacks: for the trainer.
        spent: before training.
    """

    model: PeftModel
    predicted: MemoryEstimate
    module_names: tuple[str, ...]
    mean_bits: float
    mean_rank: float
    callbacks: tuple[TrainerCallback, ...] = ()
    spent: Spent = field(default_factory=Spent)


class Method(Protocol):
    """Makes a model to train.

    Attributes:
        name: in tables and records.
        needs_budget: whether it fits itself into a budget; others take what they take.
    """

    name: str
    needs_budget: bool

    def prepare(self, setting: Setting, budget: str | None, args: SFTConfig) -> Prepared:
        """Load, quantize and add adapters.

        Args:
            setting: model, task and recipe.
            budget: as :func:`benchmarks.finetune.budget.split_budget` takes it.
            args: of this very run; ``torch.manual_seed(args.seed)`` was called.

        Raises:
            NotApplicable: nothing fits the budget.
        """
        ...


class Allocator(Protocol):
    """Chooses the bits and rank of every layer.

    Attributes:
        name: in tables and records.
    """

    name: str

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Write a :class:`~peft_autoqra.BitRankPlan` with its calibration into a folder.

        Raises:
            NotApplicable: nothing fits the budget.
        """
        ...
