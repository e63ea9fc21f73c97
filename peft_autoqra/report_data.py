"""What a report shows, read from the files that a search leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft_autoqra.errors import SearchStateError
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo, objective_from
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_file import PLAN_FILE
from peft_autoqra.plan_points import BEST_SEARCHED, WINNER, PlanPoint, budget_from, points_from
from peft_autoqra.sealed_record import unsealed
from peft_autoqra.trial_log import TOLD_AT

_TRIALS_FILE, _RESULT_FILE, _RECIPE_FILE, _PLAN_FOLDER = "trials.jsonl", "search_result.json", "recipe.yaml", "plan"
_BREAK_SECONDS = 60.0  # without a trial: the search was stopped meanwhile


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial of the log.

    Attributes:
        number: in the order of asking.
        stage: who proposed it, without details.
        origin: who proposed it.
        num_steps: training steps before it was scored.
        seed: of the training run.
        learning_rate_factor: the recipe's learning rate was multiplied by it.
        loss: what the search minimized; None when failed.
        sequence_losses: of each held-out sequence.
        seconds: that it took.
        end_seconds: when it was done, since the first trial began. Time while nothing ran does not count.
        cost: in units of one full fine-tune.
        total_bytes: in the scope of the budget.
        error: why it failed.
        metrics: further figures by their names.
    """

    number: int
    stage: str
    origin: str
    num_steps: int
    seed: int
    learning_rate_factor: float
    loss: float | None
    sequence_losses: tuple[float, ...]
    seconds: float
    end_seconds: float
    cost: float
    total_bytes: int
    error: str | None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComparedPlan:
    """The winner or a baseline after its final run.

    Attributes:
        number: of its first trial.
        name: ``"winner"``, ``"best searched"`` or the baseline's.
        origin: who proposed it.
        loss: what the search minimized; None when failed.
        held_out_loss: nats per token; None when failed, or where it is not known.
        num_steps: training steps before it was scored.
        num_seeds: training seeds that the loss is the mean of.
        margin: mean of the winner's loss minus this one's, and its 95% interval.
        total_bytes: in the scope of the budget.
        average_bits: mean bits per weight.
        average_rank: mean rank over modules.
        memory: bytes by part, where known.
    """

    number: int
    name: str
    origin: str
    loss: float | None
    held_out_loss: float | None
    num_steps: int
    num_seeds: int
    margin: tuple[float, float, float] | None
    total_bytes: int
    average_bits: float
    average_rank: float
    memory: MemoryEstimate | None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that is there; a search under way has no result yet.

    Attributes:
        directory: where it was read.
        plan: the winner.
        compared: the winner and the baselines.
        trials: in the order in which they were done.
        points: plans at the last fidelity against each other.
        calibration: its cost in units of one full fine-tune, and its seconds.
        surrogate_checks: how well candidates would have been promoted, each time that was asked.
        budget: bytes and what they limit.
        identity: settings, data and model of the search.
        recipe: text of the recipe.
        seconds: wall-clock time of trials and calibration, interruptions left out.
        verdict: what the search is worth over the best baseline, in words.
        cost: of the search and its limit, in units of one full fine-tune.
        objective: what losses are of.
    """

    directory: Path
    plan: BitRankPlan | None = None
    compared: tuple[ComparedPlan, ...] = ()
    trials: tuple[TrialRow, ...] = ()
    points: tuple[PlanPoint, ...] = ()
    calibration: tuple[float, float] | None = None
    surrogate_checks: tuple[Mapping[str, Any], ...] = ()
    budget: tuple[int, str] | None = None
    identity: Mapping[str, Any] | None = None
    recipe: str | None = None
    seconds: float | None = None
    verdict: str | None = None
    cost: tuple[float, float] | None = None
    objective: ObjectiveInfo = HELD_OUT_LOSS


def read_report_data(directory: Path) -> ReportData:
    """Read the directory of a search, finished or under way, or of a plan alone; nothing is written.

    Raises:
        SearchStateError: the directory is not there, holds neither, or a file is damaged.
        InvalidPlanError: the plan is damaged.
    """
    if not directory.is_dir():
        raise SearchStateError(f"There is no directory {directory}.")
    identity, trials = _read_trials(directory / _TRIALS_FILE)
    result = _read_result(directory / _RESULT_FILE)
    plan = _read_plan(directory)
    if plan is None and identity is None:
        raise SearchStateError(
            f"{directory} holds neither {_TRIALS_FILE} of a search nor {PLAN_FILE}; give a search's output_dir."
        )
    known = result or (plan.provenance if plan else {})
    recipe = directory / _RECIPE_FILE
    data = ReportData(
        directory=directory,
        plan=plan,
        trials=trials,
        points=points_from(known),
        budget=budget_from(known),
        identity=identity,
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
        objective=objective_from(known) if known else _objective_under_way(identity or {}, trials),
    )
    try:
        return data if result is None else _with_result(data, result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SearchStateError(_damaged(directory / _RESULT_FILE, error)) from error


def _with_result(data: ReportData, result: Mapping[str, Any]) -> ReportData:
    return replace(
        data,
        compared=_compared(result, data.plan),
        calibration=_calibration(result, data.trials),
        surrogate_checks=tuple(result.get("surrogate_checks", ())),
        seconds=result["seconds"],
        verdict=result.get("verdict"),
        cost=(result["cost"], result["max_cost"]),
    )


def _read_plan(directory: Path) -> BitRankPlan | None:
    for folder in (directory / _PLAN_FOLDER, directory):
        if (folder / PLAN_FILE).is_file():
            return BitRankPlan.from_pretrained(folder)
    return None


def _read_result(path: Path) -> dict[str, Any] | None:
    """The result.

    Raises:
        SearchStateError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        result = unsealed(result)
    except (TypeError, ValueError) as error:
        raise SearchStateError(_damaged(path, error)) from error
    if not result:
        raise SearchStateError(_damaged(path, TypeError("no result of a search")))
    return result


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged ({error!r}); run the search again, finished trials are kept."


def _read_trials(path: Path) -> tuple[dict[str, Any] | None, tuple[TrialRow, ...]]:
    """Identity and trials; a last line that is being written just now is left out.

    Raises:
        SearchStateError: the log is damaged.
    """
    if not path.is_file():
        return None, ()
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
    try:
        records = [unsealed(json.loads(line)) for line in lines]
        identity = records[0]["identity"] if records else {}
        told = [record for record in records[1:] if record["kind"] == "trial"]
        return identity, tuple(_trial_row(record, end) for record, end in zip(told, _ends(told), strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise SearchStateError(f"{path} is damaged ({error!r}).") from error


def _ends(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """When each trial was done, in seconds since the first began, without breaks between a stop and going on.

    Trials may have run side by side. Logs of earlier versions do not say when; their trials ran one after the other.
    """
    ends: list[float] = []
    busy_until, shift = 0.0, None
    for record in records:
        seconds = record["result"]["seconds"]
        end = busy_until + seconds
        if TOLD_AT in record:
            start = record[TOLD_AT] - seconds
            if shift is None or start + shift > busy_until + _BREAK_SECONDS:
                shift = busy_until - start
            end = record[TOLD_AT] + shift
        ends.append(end)
        busy_until = max(busy_until, end)
    starts = [end - record["result"]["seconds"] for end, record in zip(ends, records, strict=True)]
    return [end - min(starts) for end in ends]


def _trial_row(record: Mapping[str, Any], end_seconds: float) -> TrialRow:
    result, fidelity = record["result"], record["fidelity"]
    loss = result["loss"]
    return TrialRow(
        number=record["number"],
        stage=record["origin"].split(":")[0],
        origin=record["origin"],
        num_steps=fidelity["num_steps"],
        seed=fidelity["seed"],
        learning_rate_factor=fidelity["learning_rate_factor"],
        loss=loss if loss is not None and math.isfinite(loss) else None,
        sequence_losses=tuple(result["sequence_losses"]),
        seconds=result["seconds"],
        end_seconds=end_seconds,
        cost=record["cost"],
        total_bytes=record["total_bytes"],
        error=result["error"],
        metrics=result.get("metrics", {}),
    )


def _objective_under_way(identity: Mapping[str, Any], trials: Sequence[TrialRow]) -> ObjectiveInfo:
    """The log names figures beside the losses only; that of the objective is the loss, or its negative."""
    if identity.get("objective", "loss") == "loss":
        return HELD_OUT_LOSS
    for trial in trials:
        for name, value in trial.metrics.items():
            if name != "held_out_loss" and trial.loss and math.isclose(abs(value), abs(trial.loss), rel_tol=1e-6):
                return objective_from({"objective": {"name": name, "greater_is_better": value * trial.loss < 0}})
    return ObjectiveInfo("objective")


def _calibration(result: Mapping[str, Any], trials: Sequence[TrialRow]) -> tuple[float, float]:
    seconds = result["seconds"] - max((trial.end_seconds for trial in trials), default=0.0)
    return result["cost"] - sum(trial.cost for trial in trials), max(0.0, seconds)


def _compared(result: Mapping[str, Any], plan: BitRankPlan | None) -> tuple[ComparedPlan, ...]:
    named = {WINNER: result["winner"], **result["baselines"], BEST_SEARCHED: result.get("best_searched")}
    memories = {WINNER: plan.memory if plan else None}
    return tuple(
        _compared_plan(name, summary, memories.get(name)) for name, summary in named.items() if summary is not None
    )


def _compared_plan(name: str, summary: Mapping[str, Any], memory: MemoryEstimate | None) -> ComparedPlan:
    margin = summary.get("winner_minus_this")
    parts = summary.get("memory")
    return ComparedPlan(
        number=summary["number"],
        name=name,
        origin=summary["origin"],
        loss=summary["loss"],
        held_out_loss=summary.get("held_out_loss"),
        num_steps=summary["steps"],
        num_seeds=len(summary["seed_losses"]),
        margin=(margin["mean"], *margin["interval"]) if margin else None,
        total_bytes=summary["total_bytes"],
        average_bits=summary["average_bits"],
        average_rank=summary["average_rank"],
        memory=MemoryEstimate(**parts) if parts else memory,
    )
