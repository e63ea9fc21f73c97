"""This package's search, and what is left of it without its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.search.run import Method, Run, until_spent
from peft_autoqra.importance.warm_starts import best_uniform
from peft_autoqra.search.engine import SearchEngine
from peft_autoqra.search.ledger import Outcome
from peft_autoqra.search.spending import plan_spending
from peft_autoqra.search_problem import SearchProblem

Restriction = Callable[[SearchProblem], SearchProblem]


def unrestricted(problem: SearchProblem) -> SearchProblem:
    """All choices."""
    return problem


def bits_only(problem: SearchProblem) -> SearchProblem:
    """One rank everywhere: that of the best uniform candidate."""
    rank = _uniform_choice(problem)[1]
    return _only(problem, np.arange(len(problem.space.rank_choices))[None, :] == rank)


def ranks_only(problem: SearchProblem) -> SearchProblem:
    """One bit-width everywhere: that of the best uniform candidate."""
    bits = _uniform_choice(problem)[0]
    return _only(problem, np.arange(len(problem.space.bit_choices))[:, None] == bits)


def autoqra(*without: str, restrict: Restriction = unrestricted) -> Method:
    """The search without some stages (see ``Spending.without``), or with a part of the choices.

    Further seeds are run only where there is training noise to average out.
    """

    @until_spent
    def search(run: Run, seed: int) -> None:
        environment = run.environment
        spending = plan_spending(environment.level_costs, run.budget, num_seeds=environment.num_seeds)
        spending = spending.without(*without)
        lowest = len(environment.level_costs) - len(spending.level_costs)
        engine = SearchEngine(restrict(run.problem), spending, seed=seed, pool=environment.pool or ())
        while requests := engine.ask():
            for request in requests:
                _, evaluation = run.evaluate(request.arm, request.level + lowest, request.seed)
                engine.tell(request, Outcome(evaluation.loss, evaluation.sequence_losses))
                decision = engine.decision()
                if decision is not None:
                    run.recommend(decision.winner)

    return search


def _uniform_choice(problem: SearchProblem) -> tuple[int, int]:
    uniform = best_uniform(problem) or problem.smallest_trainable_candidate()
    return uniform[0]


def _only(problem: SearchProblem, allowed: npt.NDArray[np.bool_]) -> SearchProblem:
    """Other choices take more bytes than there are."""
    return replace(problem, bytes_table=np.where(allowed[None], problem.bytes_table, problem.budget_bytes + 1))
