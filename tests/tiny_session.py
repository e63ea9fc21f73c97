"""A whole search over a made-up loss table: everything but models, calibration and training is real."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from peft_autoqra import AutoQRASearchConfig
from peft_autoqra.search.spending import plan_spending
from peft_autoqra.search_ladder import Ladder
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_session import SearchSession
from peft_autoqra.search_setup import SearchInputs, SearchSetup
from peft_autoqra.trial import Fidelity, Trial, TrialResult, TrialStatus
from peft_autoqra.trial_log import TrialLog
from tests.tiny_data import token_dataset, word_tokenizer
from tests.tiny_evaluator import tiny_args

SEED = 5
FIDELITIES = (Fidelity(0, 4, SEED), Fidelity(8, 4, SEED))
OpenSession = Callable[..., SearchSession]


def session_setup(model: PreTrainedModel, directory: Path) -> SearchSetup:
    config = AutoQRASearchConfig(
        rank_choices=[0, 2, 4], bit_choices=[2, 4, 8], granularity="block", seed=SEED, memory_budget="180000"
    )
    data = token_dataset(seed=0), token_dataset(seed=1)
    return SearchSetup(SearchInputs(model, tiny_args(directory), *data, word_tokenizer(), config))


def session_problem(setup: SearchSetup) -> SearchProblem:
    """A made-up loss table; nothing is calibrated."""
    space = setup.space
    shape = (space.num_groups, len(space.bit_choices), len(space.rank_choices))
    weights = np.random.default_rng(0).lognormal(size=shape[0])
    bits, ranks = np.array(space.bit_choices), np.array(space.rank_choices)
    table = weights[:, None, None] * 4.0 ** -(bits - 1.0)[:, None] / (1 + ranks / 4)
    return setup.problem_with(table)


def make_ladder(max_trials: int = 13, factors: tuple[float, ...] = (1.0,), num_seeds: int = 2) -> Ladder:
    spending = plan_spending(
        (0.05, 1.0),
        1000.0,
        max_trials=max_trials,
        num_baselines=3,
        num_seeds=num_seeds,
        num_variants=len(factors),
    )
    return Ladder(FIDELITIES, spending, 0.5, factors, SEED)


def session_opener(setup: SearchSetup, directory: Path) -> OpenSession:
    """Opens sessions by the name of their log; the same name again goes on."""
    problem = session_problem(setup)

    def opened(name: str = "log", ladder: Ladder | None = None) -> SearchSession:
        log = TrialLog(directory / f"{name}.jsonl", {"search": 1})
        return SearchSession(setup, problem, ladder or make_ladder(), log)

    return opened


def evaluate(trial: Trial) -> TrialResult:
    """A loss for every plan and fidelity; one in nine fails."""
    digest = zlib.crc32(f"{trial.plan.digest} {trial.fidelity}".encode())
    if digest % 9 == 0 and trial.fidelity.num_steps == 0:
        return TrialResult(status=TrialStatus.FAILED, seconds=0.0, error="out of luck")
    losses = 2 + trial.plan.average_rank / 10 + 0.1 * np.random.default_rng(digest).normal(size=4)
    return TrialResult(
        status=TrialStatus.COMPLETED, seconds=0.0, loss=float(losses.mean()), sequence_losses=tuple(losses.tolist())
    )
