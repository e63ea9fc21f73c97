"""AutoQRA as published (arXiv 2602.22268), under this package's evaluator."""

from __future__ import annotations

import math
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.finetune.method import NotApplicable, Spent
from benchmarks.finetune.search_of import Calibrated, searcher_of
from benchmarks.finetune.setting import Setting
from benchmarks.search.environment import Evaluation
from benchmarks.search.methods.paper_evolution import MIN_POPULATION
from benchmarks.search.methods.paper_two_stages import NUM_STAGE_2_STEPS, paper_two_stages
from peft_autoqra.errors import SearchBudgetError, UnreachableBudgetError
from peft_autoqra.evaluation.sft import SFTEvaluator
from peft_autoqra.granularity import build_search_space
from peft_autoqra.search_costs import SearchCosts
from peft_autoqra.search_ladder import MIN_EVAL_SEQUENCES, SCORING_SHARE
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_setup import SearchSetup
from peft_autoqra.search_space import Candidate
from peft_autoqra.trial import Fidelity

BIT_CHOICES, RANK_CHOICES = (2, 3, 4, 8), (4, 8, 16)  # of its code
LOW_SHARE, HIGH_SHARE = 0.05 * 0.1, 0.2 * 0.5  # of a fine-tune: share of the data times epochs


@dataclass(frozen=True)
class Published:
    """Rounded priors, NSGA-II with surrogate promotion, then expected improvement, over whole decoder layers.

    Attributes:
        max_cost: of calibration and trials, in full fine-tunes.
        seed: of the stages.
    """

    max_cost: float = 2.0
    seed: int = 0

    @property
    def name(self) -> str:
        """``"published"``; the cost follows where it is not the default: ``"published-cost4"``."""
        return f"published{'' if self.max_cost == 2 else f'-cost{self.max_cost:g}'}"

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Search and write the plan that is recommended at the end.

        Raises:
            NotApplicable: the budget leaves no room for an adapter.
            SearchBudgetError: ``max_cost`` does not suffice for one generation and stage 2.
        """
        searcher = searcher_of(setting, budget, folder)
        setup, costs = searcher.setup, searcher.setup.costs
        fidelities = published_fidelities(costs, min(setup.config.num_eval_sequences, len(setup.data.held_out)))
        evaluations = _affordable(costs, fidelities, self.max_cost)
        calibrated = Calibrated.of(searcher)
        start = time.perf_counter()
        problem = published_problem(calibrated)
        environment = FineTunes(problem, setup, setup.evaluator(calibrated.bank), fidelities)
        run = paper_two_stages(environment, evaluations, self.seed)
        layers = problem.space.decode(run.records[-1].recommendation)
        calibrated.save(layers, folder, self.name, stages_seed=self.seed)
        return Spent(
            seconds=calibrated.seconds + time.perf_counter() - start,
            trials=len(run.records),
            cost=costs.calibration + run.cost * costs.trial(fidelities[-1]),
        )


def published_fidelities(costs: SearchCosts, num_eval_sequences: int) -> tuple[Fidelity, Fidelity]:
    """Low and high: its shares of a fine-tune's steps, scored on so many sequences that training still costs more.

    Args:
        costs: of trials.
        num_eval_sequences: at most.
    """
    low, high = round(LOW_SHARE * costs.full_steps), max(1, round(HIGH_SHARE * costs.full_steps))
    scoring = SCORING_SHARE / (1 - SCORING_SHARE) * costs.steps(high)  # as the search has it
    num_eval = min(num_eval_sequences, max(MIN_EVAL_SEQUENCES, int(scoring / costs.scoring(1))))
    return Fidelity(low, num_eval), Fidelity(high, num_eval)


def published_problem(calibrated: Calibrated) -> SearchProblem:
    """Its ladders over decoder layers, with this package's bytes, scores and budget.

    Raises:
        NotApplicable: its smallest plan is above the budget.
    """
    setup = calibrated.setup
    space = build_search_space(setup.memory_model.modules, "layer", BIT_CHOICES, RANK_CHOICES)
    sizes = setup.memory_model.bytes_table(space, setup.quantizer, setup.budget.scope)
    losses = calibrated.bank.error_table.loss_table(space)
    try:
        return replace(calibrated.problem, space=space, bytes_table=sizes, loss_table=losses)
    except UnreachableBudgetError as error:
        raise NotApplicable(str(error)) from error


def _affordable(costs: SearchCosts, fidelities: tuple[Fidelity, Fidelity], max_cost: float) -> float:
    """What may be spent on trials, in trials at high fidelity."""
    low, high = map(costs.trial, fidelities)
    least = costs.calibration + MIN_POPULATION * low + (1 + NUM_STAGE_2_STEPS) * high
    if max_cost < least:
        raise SearchBudgetError(
            f"max_cost={max_cost:g} full fine-tunes ({costs.full_steps:,} steps each) is too little for the published "
            f"search: calibration takes {costs.calibration:.3g}, one generation and stage 2 {least:.3g} in all. Raise "
            "max_cost to that, or fine-tune for more steps."
        )
    return (max_cost - costs.calibration) / high


@dataclass(frozen=True, eq=False)
class FineTunes:
    """Short fine-tunes as a :class:`~benchmarks.search.environment.Environment`, but for truths that nobody knows.

    Attributes:
        problem: space, exact bytes, scores, budget.
        setup: makes plans of candidates.
        evaluator: trains them.
        fidelities: cheapest first.
    """

    problem: SearchProblem
    setup: SearchSetup
    evaluator: SFTEvaluator
    fidelities: tuple[Fidelity, ...]
    name: str = "fine-tunes"
    num_seeds: int = 1
    pool: None = None

    @property
    def level_costs(self) -> tuple[float, ...]:
        """Of a trial at the highest fidelity."""
        costs = [self.setup.costs.trial(fidelity) for fidelity in self.fidelities]
        return tuple(cost / costs[-1] for cost in costs)

    def resolve(self, candidate: Candidate, taken: AbstractSet[Candidate]) -> Candidate:
        """Itself: every candidate can be trained."""
        del taken
        return candidate

    def evaluate(self, candidate: Candidate, level: int, seed: int = 0) -> Evaluation:
        """Train and score; a failed trial is worth as much as guessing, which is bad and finite."""
        plan = self.setup.plan(self.problem.space.decode(candidate), self.setup.quantizer, compensate=True)
        result = self.evaluator.evaluate(plan, replace(self.fidelities[level], seed=seed))
        if result.loss is None:
            guessing = math.log(self.setup.model.config.vocab_size)
            return Evaluation(guessing, (guessing,) * self.fidelities[level].num_eval_sequences)
        return Evaluation(result.loss, result.sequence_losses)
