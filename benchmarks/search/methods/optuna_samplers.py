"""Optuna's TPE and NSGA-II samplers, one integer parameter per ladder."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.search.run import Run, until_spent
from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import repair
from peft_autoqra.search_space import Candidate, SearchSpace

NSGA2_POPULATION = 10  # of Optuna's 50, so that the cost lasts for generations
MAX_INFEASIBLE = 2000  # proposals in a row beyond the budget of bytes, which cost nothing but time


@until_spent
def optuna_tpe(run: Run, seed: int) -> None:
    """TPE with its defaults; proposals are repaired (Eq. 4-5), and TPE learns what was evaluated in their place.

    A proposal is told as failed, from which TPE learns nothing, and the repaired candidate is added with its loss.
    """
    optuna = _optuna()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    priors, ladders = ImportancePriors.from_problem(run.problem), _ladders(optuna, run.problem.space)
    while True:
        trial = study.ask(ladders)
        resolved, evaluation = run.evaluate(repair(run.problem, _candidate(trial.params), priors))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        known = optuna.trial.create_trial(params=_params(resolved), distributions=ladders, value=evaluation.loss)
        study.add_trial(known)


@until_spent
def optuna_nsga2(run: Run, seed: int) -> None:
    """NSGA-II over (loss, bytes) with the budget as its constraint, from a population of random, repaired candidates.

    What is above the budget of bytes is known without an evaluation, so it is told at no cost with its violation;
    constrained domination never looks at its loss.
    """
    optuna = _optuna()
    sampler = optuna.samplers.NSGAIISampler(population_size=NSGA2_POPULATION, seed=seed)
    study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
    ladders, problem = _ladders(optuna, run.problem.space), run.problem
    rng, priors = np.random.default_rng(seed), ImportancePriors.from_problem(problem)
    for _ in range(NSGA2_POPULATION):  # drawn from the ladders alone, none would be within the budget
        study.enqueue_trial(_params(repair(problem, problem.space.sample(rng), priors, rng)))
    infeasible = 0
    while infeasible < MAX_INFEASIBLE:
        trial = study.ask(ladders)
        _ = trial.relative_params  # counts an enqueued trial to its generation, which is done when first read
        candidate, loss = _candidate(trial.params), 0.0
        total_bytes = problem.total_bytes(candidate)
        infeasible = infeasible + 1 if total_bytes > problem.budget_bytes else 0
        if not infeasible:
            loss = run.evaluate(candidate)[1].loss  # of what it was snapped to, where there is a pool
        trial.set_constraint("bytes", float(max(0, total_bytes - problem.budget_bytes)))
        study.tell(trial, (loss, float(total_bytes)))


def _optuna() -> Any:
    """The library, silent; it comes with the extra ``benchmark`` only, so it is imported here.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import optuna  # noqa: PLC0415 (optional dependency)
    except ImportError as error:
        raise MissingDependencyError("Optuna's samplers need optuna: pip install '.[benchmark]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _ladders(optuna: Any, space: SearchSpace) -> dict[str, Any]:
    """Name to distribution, two per group: bits, then rank."""
    tops = (space.num_rungs - 1).tolist()
    return {
        f"{axis}{group}": optuna.distributions.IntDistribution(0, top)
        for group, pair in enumerate(tops)
        for axis, top in zip(("bits", "rank"), pair, strict=True)
    }


def _candidate(params: dict[str, int]) -> Candidate:
    return tuple((params[f"bits{group}"], params[f"rank{group}"]) for group in range(len(params) // 2))


def _params(candidate: Candidate) -> dict[str, int]:
    return {
        f"{axis}{g}": v for g, pair in enumerate(candidate) for axis, v in zip(("bits", "rank"), pair, strict=True)
    }
