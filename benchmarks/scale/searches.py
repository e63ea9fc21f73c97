"""The search of one model on a number of simulated workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from benchmarks.scale.simulation import SimulatedTrial, simulate
from benchmarks.search.landscapes import ChainLandscape, multi_fidelity
from peft_autoqra.search.engine import SearchEngine
from peft_autoqra.search.ledger import Outcome, Request
from peft_autoqra.search_config import SearchArguments
from peft_autoqra.search_costs import SearchCosts
from peft_autoqra.search_ladder import Ladder, build_ladder

EXTERNAL = "qlora-4bit"
NUM_BASELINES = 3
STAGES = ("baselines", "warm starts", "evolution", "promotion", "trust region", "confirmation")


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """What one stage of a search does to workers.

    Attributes:
        stage: of :data:`STAGES`.
        num_trials: of it.
        seconds: from the first start to the last end.
        mean_running: trials of it that run at a time, on average.
        most_running: likewise, at most.
    """

    stage: str
    num_trials: int
    seconds: float
    mean_running: float
    most_running: int


@dataclass(frozen=True, kw_only=True)
class SimulatedSearch:
    """What a search takes.

    Attributes:
        num_workers: of it.
        seconds: from the beginning of calibration to the end of the last trial.
        calibration_seconds: of these, on one worker.
        busy_seconds: of all workers, calibration included.
        asking_seconds: of the process that asks.
        cost: booked, in full fine-tunes.
        num_trials: of all fidelities.
        regret: true loss of the answer above the optimum's, nats per token.
        stages: in order, without those that had no trial.
    """

    num_workers: int
    seconds: float
    calibration_seconds: float
    busy_seconds: float
    asking_seconds: float
    cost: float
    num_trials: int
    regret: float
    stages: tuple[StageTime, ...]

    @property
    def idle_share(self) -> float:
        """Of the workers' time."""
        return 1 - self.busy_seconds / (self.num_workers * self.seconds)


def recorded_ratios(folder: Path) -> tuple[float, ...]:
    """Seconds of recorded fine-tunes over their mean at the same budget, where all had the same steps to do.

    They were recorded on a shared machine, so that they scatter more than trials on machines of their own would.
    """
    lines = [line for path in sorted(folder.glob("trials-*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    seconds: dict[str, list[float]] = {}
    for row in map(json.loads, lines):
        seconds.setdefault(row["budget"], []).append(row["seconds"])
    return tuple(value / float(np.mean(values)) for values in seconds.values() for value in values)


def simulate_search(
    costs: SearchCosts,
    search: SearchArguments,
    num_workers: int,
    *,
    full_seconds: float,
    asking_seconds: float,
    ratios: Sequence[float],
    seed: int,
    num_layers: int = 16,
) -> SimulatedSearch:
    """Run the engine on a synthetic landscape with the trials that a model's search may spend.

    Args:
        costs: of the model's trials.
        search: settings.
        num_workers: that evaluate.
        full_seconds: of one full fine-tune on a worker.
        asking_seconds: of asking for one trial.
        ratios: of trials' durations to what their cost says; dealt out in the order of asking, at each fidelity the
            same ones for any number of workers.
        seed: of landscape, engine and durations.
        num_layers: of the landscape, two groups each. Fewer than the model's, since nothing but the time of asking
            depends on it.
    """
    ladder = build_ladder(search, costs, seed=seed, num_baselines=NUM_BASELINES)
    landscape = multi_fidelity(seed, num_layers)
    engine = SearchEngine(landscape.problem, ladder.spending, baselines=[EXTERNAL], seed=seed)
    calibration_seconds = ladder.calibration_cost * full_seconds

    decks = [
        cycle(np.random.default_rng([seed, level]).permutation(ratios)) for level in range(len(ladder.fidelities))
    ]

    def seconds(request: Request) -> float:
        return float(engine.ledger.level_costs[request.level] * full_seconds * next(decks[request.level]))

    trials = simulate(
        engine,
        num_workers,
        seconds,
        _outcomes(landscape, engine, ladder),
        begin_seconds=calibration_seconds,
        asking_seconds=asking_seconds,
    )
    return SimulatedSearch(
        num_workers=num_workers,
        seconds=trials[-1].end_seconds,
        calibration_seconds=calibration_seconds,
        busy_seconds=calibration_seconds + sum(trial.seconds for trial in trials),
        asking_seconds=asking_seconds * len(trials),
        cost=ladder.calibration_cost + engine.ledger.spent,
        num_trials=len(trials),
        regret=_regret(engine, landscape),
        stages=stage_times(trials),
    )


def _outcomes(landscape: ChainLandscape, engine: SearchEngine, ladder: Ladder) -> Callable[[Request], Outcome]:
    """Losses of the landscape's levels, the highest being the last fidelity; QLoRA counts as the uniform plan."""
    lowest = len(landscape.level_costs) - len(ladder.fidelities)

    def outcome(request: Request) -> Outcome:
        arm = engine.uniform if isinstance(request.arm, str) else request.arm
        evaluation = landscape.evaluate(arm or engine.allocation, request.level + lowest, request.seed)
        return Outcome(evaluation.loss, evaluation.sequence_losses)

    return outcome


def _regret(engine: SearchEngine, landscape: ChainLandscape) -> float:
    decision = engine.decision()
    winner = decision.winner if decision is not None and not isinstance(decision.winner, str) else engine.allocation
    return landscape.true_loss(winner) - landscape.optimum_loss


def stage_times(trials: Sequence[SimulatedTrial]) -> tuple[StageTime, ...]:
    """How long each stage takes, and how many workers it employs."""
    times = []
    for stage in STAGES:
        own = [trial for trial in trials if _stage(trial.request) == stage]
        if own:
            seconds = max(trial.end_seconds for trial in own) - min(trial.start_seconds for trial in own)
            times.append(
                StageTime(
                    stage=stage,
                    num_trials=len(own),
                    seconds=seconds,
                    mean_running=sum(trial.seconds for trial in own) / seconds,
                    most_running=max(_num_running(own, trial.start_seconds) for trial in own),
                )
            )
    return tuple(times)


def _num_running(trials: Sequence[SimulatedTrial], at_seconds: float) -> int:
    return sum(trial.start_seconds <= at_seconds < trial.end_seconds for trial in trials)


def _stage(request: Request) -> str:
    if request.origin == "evolution":
        return "promotion" if request.level else "evolution"
    names = {"baseline": "baselines", "allocation": "warm starts", "trust_region": "trust region"}
    return names.get(request.origin, "confirmation")
