"""One JSON line for every run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from benchmarks.finetune.method import Spent
from peft_autoqra.memory_estimate import MemoryEstimate


class DamagedRecords(ValueError):
    """A file of records that cannot be read; the message names the line."""


Status = Literal["completed", "diverged", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked for.

    Attributes:
        config: name of the configuration, which stands for model and recipe.
        task: name.
        method: name.
        budget: None for methods that take what they take.
        learning_rate: peak.
        seed: of data order and initialization.
    """

    config: str
    task: str
    method: str
    budget: str | None
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """Figures of one split.

    Attributes:
        loss: over all predicted tokens, nats per token.
        answer_loss: over those of the completion.
        metric: share of right answers; None for tasks without.
        losses: one value for each example, whose mean is ``loss``
            (:attr:`~peft_autoqra.evaluation.held_out.HeldOutLoss.weighted_losses`).
        right: ``"1"`` for each example that was answered rightly, ``"0"`` for the others.
    """

    loss: float
    answer_loss: float
    metric: float | None
    losses: tuple[float, ...]
    right: str = ""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a run.

    Attributes:
        predicted: by part, from closed forms.
        measured: by part, of the tensors at the first optimizer step.
        budget_bytes: limit; None without one.
        scope: what it limits.
        peak_bytes: allocated on the device through a training step; None on CPUs.
    """

    predicted: MemoryEstimate
    measured: MemoryEstimate
    budget_bytes: int | None = None
    scope: Literal["training", "stored"] = "training"
    peak_bytes: int | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the measured bytes are within the budget; True without one."""
        return self.budget_bytes is None or self.measured.in_scope(self.scope) <= self.budget_bytes


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came of a run.

    Attributes:
        run: what was asked for.
        status: figures are there for ``"completed"`` alone.
        digest: of model, task and recipe.
        reason: why there are none.
        dev: learning rates are chosen by this split, and plans were.
        test: figures to report.
        memory: bytes.
        mean_bits: of the targeted weights.
        mean_rank: of the targeted modules.
        spent: before training.
        train_seconds: of the steps; with quantized weights decoded once, where the configuration says so.
        num_steps: optimizer steps.
        environment: versions, device, threads, date, commit.
    """

    run: Run
    status: Status
    digest: str
    reason: str = ""
    dev: Split | None = None
    test: Split | None = None
    memory: Memory | None = None
    mean_bits: float | None = None
    mean_rank: float | None = None
    spent: Spent = field(default_factory=Spent)
    train_seconds: float = 0.0
    num_steps: int = 0
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read one line."""
        content = json.loads(line)
        memory = content["memory"]
        if memory is not None:
            for name in ("predicted", "measured"):
                memory[name] = MemoryEstimate(**memory[name])
            content["memory"] = Memory(**memory)
        for name in ("dev", "test"):
            if (split := content[name]) is not None:
                content[name] = Split(**split | {"losses": tuple(split["losses"])})
        content["run"], content["spent"] = Run(**content["run"]), Spent(**content["spent"])
        return cls(**content)


def read_records(paths: Iterable[Path]) -> list[Record]:
    """All records of some files, in order; files that are not there hold none.

    A last line without an end is none: its process was killed while it wrote, or writes still.

    Raises:
        DamagedRecords: another line is no record.
    """
    return [record for path in paths if path.exists() for record in _records_of(path)]


def append_record(path: Path, record: Record) -> None:
    """Add one record; several processes may write to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        _drop_unfinished_line(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")


def _records_of(path: Path) -> Iterator[Record]:
    complete, _, _ = path.read_text("utf-8").rpartition("\n")
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            yield Record.from_json(line)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedRecords(
                f"Line {number} of {path} is no record ({error!r}); delete it, and its run is made again."
            ) from error


def _drop_unfinished_line(path: Path) -> None:
    """Else the next record would be glued to it."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
