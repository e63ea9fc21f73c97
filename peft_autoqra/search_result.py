"""What a search found, and what it is compared with."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_autoqra.memory import MemoryBudget
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.paired import PairedDifference
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_points import BEST_SEARCHED, POINTS, WINNER, PlanPoint, pareto_front
from peft_autoqra.replaced_file import replaced_file, stored
from peft_autoqra.sealed_record import sealed
from peft_autoqra.search.surrogate import SurrogateCheck
from peft_autoqra.search_points import search_points, trial_difference
from peft_autoqra.trial import Trial

RESULT_FILE = "search_result.json"
PLAN_FOLDER = "plan"


@dataclass(frozen=True, kw_only=True)
class ComparedPlan:
    """A plan's trials at the last fidelity.

    Attributes:
        trials: by training seed, in order; at least one. Those of a finalist have as many seeds as the winner.
    """

    trials: tuple[Trial, ...]

    @property
    def first(self) -> Trial:
        """The trial of the first seed."""
        return self.trials[0]

    @property
    def losses(self) -> tuple[float, ...]:
        """Loss of every seed, in the objective's unit; empty where one failed."""
        losses = tuple(trial.loss for trial in self.trials if trial.loss is not None)
        return losses if len(losses) == len(self.trials) else ()

    @property
    def loss(self) -> float | None:
        """Mean over the seeds; None where one failed."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None with fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    def metric(self, name: str) -> float | None:
        """Mean over the seeds of a figure beside the loss; None where it was not taken."""
        found = [trial.result.metrics[name] for trial in self.trials if trial.result and name in trial.result.metrics]
        return statistics.fmean(found) if found else None

    def minus(self, other: ComparedPlan) -> PairedDifference | None:
        """Paired difference of the losses over common seeds; None where one failed."""
        if not self.losses or not other.losses:
            return None
        num = min(len(self.trials), len(other.trials))
        return trial_difference(self.trials[:num], other.trials[:num])


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Outcome of a search.

    Attributes:
        plan: the winner, calibrated and ready for ``AutoQRAConfig(plan=...)``.
        winner: its trials. A searched plan wins if it is better than the best baseline beyond the 95% interval.
        baselines: name to the trials of the plans that need no search: ``"qlora-4bit"`` where it fits the budget,
            ``"allocation"`` (exact allocation of the scores), ``"uniform"``.
        pareto_front: trials of the last fidelity at the first seed that no other beats in both loss and bytes.
        trials: every trial in the order of telling, failed ones too.
        budget: the memory limit that was kept.
        cost: of trials and calibration as booked, in units of one full fine-tune.
        max_cost: limit of that.
        seconds: wall-clock time of the trials and of calibration, interruptions left out.
        surrogate_checks: how well a surrogate would have promoted candidates, every time it was asked.
        best_searched: the searched plan with the least loss, winner or not; None where none was tried.
        num_searched: searched plans at the last fidelity, from which it was chosen.
        spending: JSON-ready fidelities, their costs, and what each stage was given.
        objective: what losses are of.
    """

    plan: BitRankPlan
    winner: ComparedPlan
    baselines: Mapping[str, ComparedPlan]
    pareto_front: Sequence[Trial]
    trials: Sequence[Trial]
    budget: MemoryBudget
    cost: float
    max_cost: float
    seconds: float
    surrogate_checks: Sequence[SurrogateCheck] = ()
    best_searched: ComparedPlan | None = None
    num_searched: int = 1
    spending: Mapping[str, Any] = field(default_factory=dict)
    objective: ObjectiveInfo = HELD_OUT_LOSS

    @property
    def best_baseline(self) -> str | None:
        """Name of the baseline with the least loss of those with the most seeds; None where all failed.

        The winner itself where it is a baseline: it was decided by losses in which all sequences count alike.
        """
        for name, compared in self.baselines.items():
            if compared == self.winner:
                return name
        usable = {name: compared for name, compared in self.baselines.items() if compared.loss is not None}
        return min(usable, key=lambda name: (-len(usable[name].trials), usable[name].loss), default=None)

    @property
    def margin(self) -> PairedDifference | None:
        """The best searched plan minus the best baseline; None where one of them is missing."""
        if self.best_searched is None or self.best_baseline is None:
            return None
        return self.best_searched.minus(self.baselines[self.best_baseline])

    @property
    def points(self) -> list[PlanPoint]:
        """Every plan at the last fidelity, against the winner."""
        named = {WINNER: self.winner, **self.baselines}
        if self.best_searched is not None:
            named[BEST_SEARCHED] = self.best_searched
        return search_points(self.trials, {name: compared.first for name, compared in named.items()})

    def described_plan(self) -> BitRankPlan:
        """The plan with what a model card shows of the comparison: the Pareto front and the named plans."""
        front = pareto_front(self.points)
        shown = [point.to_dict() for point in self.points if point.name or point in front]
        return self.plan.replace(provenance={**self.plan.provenance, POINTS: shown})

    @property
    def verdict(self) -> str:
        """What the search is worth over the best baseline, and whether seeds change it."""
        name, margin = self.best_baseline, self.margin
        if margin is None:
            return (
                "There was no searched plan to compare with the baselines at the last fidelity: the best baseline is "
                "the answer. Larger limits (max_cost, max_trials, max_seconds) or a longer fine-tune leave room for "
                "some."
            )
        low, high = self.objective.interval(*margin.bounds(self.num_searched))
        interval = f"95% interval {low:+.4f} to {high:+.4f}, best of {self.num_searched} searched plans"
        unit = self.objective.unit or self.objective.name
        figures = f"{self.objective.figure(margin.mean):+.4f} {unit}, {interval}, {margin.num_seeds} seeds"
        if not margin.is_better(self.num_searched):
            return f"No margin of the search over the best baseline, {name} ({figures}): the baseline is the answer."
        return f"The search beats the best baseline, {name} ({figures}). {self._stability(margin)}"

    def _stability(self, margin: PairedDifference) -> str:
        spread = self.winner.spread
        if spread is None:
            return "It was run with one seed, so nothing is known of other seeds."
        kept = "less" if spread < -margin.mean else "not less"
        return f"Its loss differs between seeds by {spread:.4f} (standard deviation), {kept} than that margin."

    def save(self, directory: Path) -> None:
        """Write the plan's folder and ``search_result.json``.

        Raises:
            StorageError: the disk does not take them; files that were there are kept.
        """
        with stored(directory / PLAN_FOLDER):
            self.plan.save_pretrained(directory / PLAN_FOLDER)
        with replaced_file(directory / RESULT_FILE) as partial:
            partial.write_text(json.dumps(sealed(self.summary()), indent=2), encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {
            "objective": self.objective.to_dict(),
            "winner": compared_summary(self.winner),
            "baselines": {name: self._baseline_summary(compared) for name, compared in self.baselines.items()},
            "best_searched": self._baseline_summary(self.best_searched) if self.best_searched else None,
            "num_searched": self.num_searched,
            "verdict": self.verdict,
            "spending": self.spending,
            POINTS: [point.to_dict() for point in self.points],
            "pareto_front": [trial.number for trial in self.pareto_front],
            "budget_bytes": self.budget.limit_bytes,
            "budget_scope": self.budget.scope,
            "cost": self.cost,
            "max_cost": self.max_cost,
            "seconds": self.seconds,
            "num_trials": len(self.trials),
            "num_failed": sum(trial.loss is None for trial in self.trials),
            "surrogate_checks": [asdict(check) for check in self.surrogate_checks],
        }

    def _baseline_summary(self, compared: ComparedPlan) -> dict[str, Any]:
        summary = compared_summary(compared)
        margin = self.winner.minus(compared)
        if margin is not None:
            summary["winner_minus_this"] = {
                "mean": margin.mean,
                "standard_error": margin.standard_error,
                "interval": list(margin.interval),
                "num_seeds": margin.num_seeds,
            }
        return summary


def compared_summary(compared: ComparedPlan) -> dict[str, Any]:
    """The figures of one plan, without its layers."""
    trial = compared.first
    result = trial.result
    return {
        "number": trial.number,
        "origin": trial.origin,
        "loss": compared.loss,
        "held_out_loss": compared.loss if (known := compared.metric("held_out_loss")) is None else known,
        "seed_losses": compared.losses,
        "steps": trial.fidelity.num_steps,
        "learning_rate_factor": trial.fidelity.learning_rate_factor,
        "total_bytes": trial.total_bytes,
        "memory": trial.plan.memory.to_dict() if trial.plan.memory else None,
        "average_bits": trial.plan.average_bits,
        "average_rank": trial.plan.average_rank,
        "quantizer": trial.plan.quantizer.backend,
        "seconds": result.seconds if result else None,
        "error": result.error if result else None,
    }
