"""Random search over candidates that use their budget."""

from __future__ import annotations

import numpy as np

from benchmarks.search.run import Run, until_spent
from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import fill, repair
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate


def random_candidate(problem: SearchProblem, priors: ImportancePriors, rng: np.random.Generator) -> Candidate:
    """Drawn uniformly from the ladders, walked down to the budget and then up until it is used."""
    return fill(problem, repair(problem, problem.space.sample(rng), priors, rng), priors, rng)


@until_spent
def random_search(run: Run, seed: int) -> None:
    """Draw and evaluate; the paper's priors price the steps of the walks, with noise."""
    rng = np.random.default_rng(seed)
    priors = ImportancePriors.from_problem(run.problem)
    while True:
        run.evaluate(random_candidate(run.problem, priors, rng))
