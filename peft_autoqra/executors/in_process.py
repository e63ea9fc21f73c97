"""One trial after the other, in the process of the search."""

from __future__ import annotations

from peft_autoqra.executors.worker_source import WorkerSource
from peft_autoqra.trial import Evaluator, Trial, TrialResult


class InProcessExecutor:
    """Evaluates on the search's own model when it is waited for; a :class:`TrialExecutor`."""

    num_slots = 1

    def __init__(self) -> None:
        """The model comes with :meth:`open`."""
        self._evaluator: Evaluator | None = None
        self._trials: list[Trial] = []

    def open(self, source: WorkerSource) -> None:
        """Take the model."""
        self._evaluator = source.evaluator()

    def submit(self, trial: Trial) -> None:
        """Remember it."""
        self._trials.append(trial)

    def wait(self) -> list[tuple[int, TrialResult]]:
        """Evaluate the first trial that was submitted; nothing to wait for without one."""
        if self._evaluator is None or not self._trials:
            return []
        trial = self._trials.pop(0)
        return [(trial.number, self._evaluator.evaluate(trial.plan, trial.fidelity))]

    def close(self) -> None:
        """Forget the model, which its owner restores."""
        self._evaluator = None
        self._trials.clear()
