"""What is fine-tuned on: data sets in TRL's prompt-completion format, each with the metric that judges it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict

from benchmarks.finetune.hub_tasks import alpaca, gsm8k, metamath
from peft_autoqra.errors import EvaluationError
from peft_autoqra.evaluation.objective import MAX_NEW_TOKENS

PREPARE = Path(__file__).parents[2] / "scripts" / "prepare_demo_assets.py"
FINAL_ANSWER = str(Path(__file__).with_name("final_answer.py"))
SOLUTION_TOKENS = 320
"""Of a worked solution; the longest of GSM8K's have about 300."""


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """How many examples are taken from the front of each split."""

    train: int
    dev: int
    test: int

    def __post_init__(self) -> None:
        """Nothing can be trained or judged on no example.

        Raises:
            EvaluationError: a size below 1.
        """
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise EvaluationError(f"{field.name}={getattr(self, field.name)} examples; at least 1 is needed.")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and how models are judged on it, besides the held-out loss of whole texts.

    Attributes:
        name: as :func:`load_task` knows it.
        train: columns ``prompt`` and ``completion``; so have the others, which share no example with it.
        dev: for choosing: plans, learning rates.
        test: for what is reported.
        metric: name of an objective, see :func:`peft_autoqra.evaluation.named_objective.make_objective`.
        max_new_tokens: of what a model writes, where the metric is of texts.
    """

    name: str
    train: Dataset
    dev: Dataset
    test: Dataset
    metric: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Where a task comes from.

    Attributes:
        load: gives ``train``, ``dev`` and ``test``, whole and in an order of which every prefix is a fair sample.
        metric: as of :class:`Task`.
        max_new_tokens: as of :class:`Task`.
    """

    load: Callable[[], DatasetDict]
    metric: str
    max_new_tokens: int = MAX_NEW_TOKENS


def load_task(name: str, sizes: SplitSizes) -> Task:
    """Load a task's data, preparing or downloading it where that was not done before.

    Args:
        name: a key of ``TASKS``.
        sizes: of the splits.

    Raises:
        EvaluationError: there is no such task, or it has fewer examples.
    """
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise EvaluationError(f"There is no task {name!r}.{hint} There are: {', '.join(TASKS)}.")
    source = TASKS[name]
    splits = source.load()
    for split, rows in splits.items():
        if getattr(sizes, split) > len(rows):
            raise EvaluationError(
                f"{split}={getattr(sizes, split)} examples of {name!r} are wanted, and it has {len(rows)}; take fewer."
            )
    fronts = {split: rows.select(range(getattr(sizes, split))) for split, rows in splits.items()}
    return Task(name=name, **fronts, metric=source.metric, max_new_tokens=source.max_new_tokens)


def prepared(folder: str) -> DatasetDict:
    """Splits that scripts/prepare_demo_assets.py makes."""
    command = [sys.executable, str(PREPARE), "--json", folder]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    directory = Path(json.loads(output)[folder])
    return DatasetDict({split: _read_jsonl(directory / f"{split}.jsonl") for split in ("train", "dev", "test")})


def _read_jsonl(path: Path) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


TASKS: dict[str, TaskSource] = {
    "reviews": TaskSource(load=partial(prepared, "rotten_tomatoes"), metric="accuracy"),
    "headlines": TaskSource(load=partial(prepared, "headlines"), metric="accuracy"),
    "quartz": TaskSource(load=partial(prepared, "quartz"), metric="accuracy"),
    "gsm8k": TaskSource(load=gsm8k, metric=FINAL_ANSWER, max_new_tokens=SOLUTION_TOKENS),
    "metamath": TaskSource(load=metamath, metric=FINAL_ANSWER, max_new_tokens=SOLUTION_TOKENS),
    "alpaca": TaskSource(load=alpaca, metric="loss"),
}
"""The first three are made of registry packages; the others need the hub."""
