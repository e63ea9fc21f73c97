"""What a search found, and what it is compared with."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_autoqra.memory import MemoryBudget
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.trial import Trial

RESULT_FILE = "search_result.json"
PLAN_FOLDER = "plan"


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Difference of two plans' held-out losses on the same sequences, nats per token; below 0 favours the first.

    Attributes:
        mean: over sequences.
        standard_error: of that mean.
    """

    mean: float
    standard_error: float


def paired_difference(first: Trial, second: Trial) -> PairedDifference:
    """Compare two completed trials of one fidelity, sequence by sequence."""
    differences = [a - b for a, b in zip(first.result.sequence_losses, second.result.sequence_losses, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return PairedDifference(mean=statistics.fmean(differences), standard_error=spread / math.sqrt(len(differences)))


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Outcome of a search.

    Attributes:
        plan: the winner, calibrated and ready for ``AutoQRAConfig(plan=...)``.
        winner: its trial at the final fidelity.
        baselines: name to final trial of the plans that need no search: ``"qlora-4bit"`` where it fits the budget,
            ``"allocation"`` (exact allocation of the scores), ``"uniform"``.
        pareto_front: short runs that no other beats in both loss and bytes.
        trials: every trial in order, failed ones too.
        budget: the limit that was kept.
        seconds: summed time of the trials and of calibration.
    """

    plan: BitRankPlan
    winner: Trial
    baselines: Mapping[str, Trial]
    pareto_front: Sequence[Trial]
    trials: Sequence[Trial]
    budget: MemoryBudget
    seconds: float

    def save(self, directory: Path) -> None:
        """Write the plan's folder and ``search_result.json``."""
        self.plan.save_pretrained(directory / PLAN_FOLDER)
        partial = directory / f"{RESULT_FILE}.partial"
        partial.write_text(json.dumps(self.summary(), indent=2), encoding="utf-8")
        partial.replace(directory / RESULT_FILE)

    def summary(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {
            "winner": trial_summary(self.winner),
            "baselines": {name: self._baseline_summary(trial) for name, trial in self.baselines.items()},
            "pareto_front": [trial.number for trial in self.pareto_front],
            "budget_bytes": self.budget.limit_bytes,
            "budget_scope": self.budget.scope,
            "seconds": self.seconds,
            "num_trials": len(self.trials),
            "num_failed": sum(trial.loss is None for trial in self.trials),
        }

    def _baseline_summary(self, trial: Trial) -> dict[str, Any]:
        summary = trial_summary(trial)
        if trial.loss is not None and trial.fidelity == self.winner.fidelity:
            margin = paired_difference(self.winner, trial)
            summary["winner_minus_this"] = {"mean": margin.mean, "standard_error": margin.standard_error}
        return summary


def trial_summary(trial: Trial) -> dict[str, Any]:
    """The figures of one trial, without its layers."""
    return {
        "number": trial.number,
        "origin": trial.origin,
        "loss": trial.loss,
        "steps": trial.fidelity.num_steps,
        "total_bytes": trial.total_bytes,
        "memory": trial.plan.memory.to_dict() if trial.plan.memory else None,
        "average_bits": trial.plan.average_bits,
        "average_rank": trial.plan.average_rank,
        "quantizer": trial.plan.quantizer.backend,
        "seconds": trial.result.seconds,
        "error": trial.result.error,
    }
