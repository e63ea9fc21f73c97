"""Runs of methods on landscapes as independent jobs, recorded so that none is made twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.search.environment import Environment
from benchmarks.search.landscapes import LANDSCAPES
from benchmarks.search.methods.registry import ABLATIONS, METHODS
from benchmarks.search.replay import ReplayEnvironment, load_replays


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        landscape: name of a synthetic landscape or of a recorded budget.
        method: name in the registry.
        seed: draws the synthetic landscape, and is the method's.
        budget: cost that may be spent, in evaluations at the highest level.
    """

    landscape: str
    method: str
    seed: int
    budget: float


@dataclass(frozen=True)
class RegretCurve:
    """What came out of a run.

    Attributes:
        job: what was run.
        steps: cost so far and simple regret of the recommendation (nats per token) after each evaluation.
        seconds: wall-clock time of the run; evaluations take next to none of it.
    """

    job: Job
    steps: tuple[tuple[float, float], ...]
    seconds: float

    def at(self, costs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Regret of the last recommendation at each cost; infinite before the first."""
        spent, regrets = np.array([(0.0, np.inf), *self.steps]).T
        return np.asarray(regrets[np.searchsorted(spent, costs + 1e-9, side="right") - 1])


def run_job(job: Job, trials_dir: Path) -> RegretCurve:
    """Make the environment and run the method on it, on one thread."""
    torch.set_num_threads(1)
    environment = make_environment(job.landscape, job.seed, trials_dir)
    start = time.perf_counter()
    run = {**METHODS, **ABLATIONS}[job.method](environment, job.budget, job.seed)
    seconds = time.perf_counter() - start
    steps = tuple((round(cost, 4), round(regret, 6)) for cost, regret in run.regrets())
    return RegretCurve(job, steps, round(seconds, 2))


def make_environment(landscape: str, seed: int, trials_dir: Path) -> Environment:
    """A synthetic landscape of this seed, or the recorded budget of this name."""
    if landscape in LANDSCAPES:
        return LANDSCAPES[landscape](seed)
    return _replays(trials_dir)[landscape]


@cache
def _replays(trials_dir: Path) -> dict[str, ReplayEnvironment]:
    return load_replays(trials_dir)


def run_jobs(jobs: Sequence[Job], trials_dir: Path, num_processes: int) -> Iterator[RegretCurve]:
    """Run all, in the order in which they end; fresh processes, so that no run sees another's state."""
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as executor:
        futures = [executor.submit(run_job, job, trials_dir) for job in jobs]
        for future in as_completed(futures):
            yield future.result()


def read_curves(path: Path) -> dict[Job, RegretCurve]:
    """What was recorded; of repeats the last."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    curves = (RegretCurve(Job(**row["job"]), tuple(map(tuple, row["steps"])), row["seconds"]) for row in rows)
    return {curve.job: curve for curve in curves}


def append_curve(path: Path, curve: RegretCurve) -> None:
    """Record one more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(curve)) + "\n")


def write_curves(path: Path, curves: Sequence[RegretCurve]) -> None:
    """Replace the record: sorted, without repeats."""
    ordered = sorted(curves, key=lambda curve: astuple(curve.job))
    path.write_text("".join(json.dumps(asdict(curve)) + "\n" for curve in ordered), encoding="utf-8")
