"""The stages of a search in order; every trial goes through the log first."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from peft_autoqra.errors import MemoryBudgetError, SearchStateError
from peft_autoqra.importance.allocation import allocate
from peft_autoqra.plan import BitRankPlan, QuantizerSettings
from peft_autoqra.search.bayesopt import Observation, TrustRegionSettings, TrustRegionStage
from peft_autoqra.search.evolution import EvolutionSettings, EvolutionStage
from peft_autoqra.search.surrogate import PromotionSurrogate
from peft_autoqra.search_config import SearchArguments
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_setup import SearchSetup
from peft_autoqra.search_space import Candidate
from peft_autoqra.trial import Evaluator, Fidelity, Trial
from peft_autoqra.trial_log import TrialLog

QLORA_RANK = 16


@dataclass(frozen=True)
class TrialCounts:
    """Trials of a search at most, by fidelity."""

    untrained: int
    short: int
    final: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.untrained + self.short + self.final


def trial_counts(config: SearchArguments) -> TrialCounts:
    """How many trials a search with these settings runs at most."""
    num_warm, num_baselines = len(config.rank_choices) + 1, 3
    evolves = config.num_generations > 0 and config.num_promoted > 0
    return TrialCounts(
        untrained=num_warm + config.population_size * config.num_generations if evolves else 0,
        short=num_warm + 1 + config.num_promoted * evolves + config.num_trust_region_trials,
        final=config.num_finalists + num_baselines,
    )


@dataclass(frozen=True)
class Finals:
    """Final trials of the searched plans and of the baselines."""

    searched: dict[Candidate, Trial]
    baselines: dict[str, Trial]


class SearchPipeline:
    """Runs the stages. Given equal trial results it takes equal decisions, so a resumed search replays its log.

    Args:
        setup: model, data and budget.
        problem: with the calibrated loss table.
        evaluator: runs the trials that the log does not hold.
        log: of this search.
        progress: a bar that is moved once a trial.
    """

    def __init__(
        self, setup: SearchSetup, problem: SearchProblem, evaluator: Evaluator, log: TrialLog, progress: tqdm
    ) -> None:
        """Nothing runs yet."""
        self.setup, self.problem, self.log = setup, problem, log
        self._evaluator, self._progress = evaluator, progress
        config = setup.config
        self.untrained = Fidelity(0, config.num_eval_sequences, config.seed)
        self.short = Fidelity(config.short_steps, config.num_eval_sequences, config.seed)
        self.final = Fidelity(config.final_steps, config.num_eval_sequences, config.seed)
        self._surrogate = PromotionSurrogate(problem, seed=config.seed)
        self._best: Trial | None = None

    def run(self) -> Finals:
        """All stages; the finals decide."""
        short = self._run_warm_starts()
        baselines = self.baseline_plans()
        if "qlora-4bit" in baselines:
            self._evaluate(baselines["qlora-4bit"], self.short, "baseline:qlora-4bit")
        self._evolve(short)
        self._search_trust_region(short)
        return self._run_finals(short, baselines)

    def baseline_plans(self) -> dict[str, BitRankPlan]:
        """Plans that need no search and fit the budget: exact allocation, uniform, uniform 4-bit QLoRA."""
        plans = {}
        allocation, uniform = self._trainable(allocate(self.problem)), self._best_uniform()
        if allocation is not None:
            plans["allocation"] = self.setup.searched_plan(allocation)
        if uniform is not None:
            plans["uniform"] = self.setup.searched_plan(uniform)
        qlora = self._qlora_plan()
        if qlora is not None:
            plans["qlora-4bit"] = qlora
        return plans

    def _trainable(self, candidate: Candidate) -> Candidate | None:
        has_rank = any(layer.rank for layer in self.setup.space.decode(candidate).values())
        return candidate if has_rank else None

    def _best_uniform(self) -> Candidate | None:
        """Of the largest feasible uniform rank at every bit-width, the one that scores best."""
        space, feasible = self.setup.space, self.problem.is_feasible
        fitting = [
            max((c for rank in space.rank_choices if feasible(c := space.uniform(bits, rank))), default=None)
            for bits in space.bit_choices
        ]
        trainable = [c for c in fitting if c is not None and self._trainable(c)]
        return min(trainable, key=self.problem.predicted_loss, default=None)

    def _qlora_plan(self) -> BitRankPlan | None:
        """Uniform NF4 with zero start and the largest rank up to 16 that fits; None where none does."""
        quantizer = QuantizerSettings(backend="bitsandbytes")
        for rank in range(QLORA_RANK, 0, -1):
            plan = self.setup.plan(self.setup.memory_model.uniform(4, rank), quantizer, compensate=False)
            if plan.memory and plan.memory.in_scope(self.setup.budget.scope) <= self.setup.budget.limit_bytes:
                return plan
        return None

    def _warm_starts(self) -> dict[Candidate, str]:
        """Exact allocations with every rank as a floor, and the best uniform candidate.

        The scores know what a rank repairs before training, not what it learns in it. Short runs along this family
        show how much rank the task wants.
        """
        starts: dict[Candidate, str] = {}
        for floor_index, floor in enumerate(self.setup.space.rank_choices):
            try:
                candidate = self._trainable(allocate(_with_rank_floor(self.problem, floor_index)))
            except MemoryBudgetError:  # this floor and all above it are out of reach
                break
            if candidate is not None:
                starts.setdefault(candidate, f"allocation:rank>={floor}")
        uniform = self._best_uniform()
        if uniform is not None:
            starts.setdefault(uniform, "uniform")
        return starts or {self.problem.smallest_trainable_candidate(): "smallest"}

    def _run_warm_starts(self) -> dict[Candidate, Trial]:
        """Short runs of the warm starts."""
        return {
            candidate: self._evaluate(self.setup.searched_plan(candidate), self.short, origin)
            for candidate, origin in self._warm_starts().items()
        }

    def _evolve(self, short: dict[Candidate, Trial]) -> None:
        """Stage 1: evolve on the untrained loss, corrected by what short runs showed; promote a few."""
        config = self.setup.config
        if not config.num_generations or not config.num_promoted:
            return
        stage = EvolutionStage(
            self.problem,
            EvolutionSettings(
                population_size=config.population_size, num_generations=config.num_generations, seed=config.seed
            ),
            initial_candidates=list(short),
        )
        cheap: dict[Candidate, float] = {}
        for candidate in short:
            cheap[candidate] = _loss(self._screen(candidate, "allocation"))
        self._surrogate.fit([(c, cheap[c], _loss(trial)) for c, trial in short.items()])
        while not stage.is_done:
            batch = stage.ask()
            if not batch:
                break
            for candidate in batch:
                if candidate not in cheap:
                    cheap[candidate] = _loss(self._screen(candidate, "evolution"))
            stage.tell(list(zip(batch, self._surrogate.predict([(c, cheap[c]) for c in batch]), strict=True)))
        pool = [
            (c, loss) for c, loss in cheap.items() if c not in short and math.isfinite(loss) and self._trainable(c)
        ]
        for candidate in self._surrogate.promote(pool, config.num_promoted):
            short[candidate] = self._evaluate(self.setup.searched_plan(candidate), self.short, "evolution")

    def _screen(self, candidate: Candidate, origin: str) -> Trial:
        return self._evaluate(self.setup.searched_plan(candidate), self.untrained, origin)

    def _search_trust_region(self, short: dict[Candidate, Trial]) -> None:
        """Stage 2: Bayesian optimization of the loss after a short run, around the best plan."""
        config = self.setup.config
        stage = TrustRegionStage(
            self.problem,
            TrustRegionSettings(num_trials=config.num_trust_region_trials, seed=config.seed),
            [Observation(candidate, trial.loss) for candidate, trial in short.items()],
        )
        while not stage.is_done:
            batch = stage.ask()
            if not batch:
                break
            results = []
            for candidate in batch:
                trial = self._evaluate(self.setup.searched_plan(candidate), self.short, "trust_region")
                short[candidate] = trial
                results.append(Observation(candidate, trial.loss))
            stage.tell(results)

    def _run_finals(self, short: dict[Candidate, Trial], baselines: dict[str, BitRankPlan]) -> Finals:
        completed = [c for c, trial in short.items() if trial.loss is not None]
        best = sorted(completed, key=lambda c: _loss(short[c]))[: self.setup.config.num_finalists]
        searched = {c: self._evaluate(self.setup.searched_plan(c), self.final, short[c].origin) for c in best}
        finals = {name: self._evaluate(plan, self.final, f"baseline:{name}") for name, plan in baselines.items()}
        if all(trial.loss is None for trial in (*searched.values(), *finals.values())):
            errors = {trial.result.error for trial in self.log.trials if trial.result.error}
            raise SearchStateError(
                f"Every final trial failed: {errors}. Mend the cause, then use another output_dir or delete "
                f"{self.log.path}, which remembers the failures; calibration is kept."
            )
        return Finals(searched, finals)

    def _evaluate(self, plan: BitRankPlan, fidelity: Fidelity, origin: str) -> Trial:
        """The logged trial, or a new one."""
        trial = self.log.find(plan, fidelity)
        if trial is None:
            self._progress.set_postfix_str(self._status(origin, fidelity))
            result = self._evaluator.evaluate(plan, fidelity)
            total = plan.memory.in_scope(self.setup.budget.scope) if plan.memory else 0
            trial = Trial(
                number=len(self.log.trials),
                origin=origin,
                plan=plan,
                fidelity=fidelity,
                total_bytes=total,
                result=result,
            )
            self.log.add(trial)
        else:
            trial = replace(trial, plan=plan)  # the log keeps only what decides the outcome
        self._progress.update()
        if trial.loss is not None and fidelity.num_steps and (self._best is None or _rank(trial) < _rank(self._best)):
            self._best = trial
        return trial

    def _status(self, origin: str, fidelity: Fidelity) -> str:
        best = f"best {self._best.loss:.4f} after {self._best.fidelity.num_steps} steps, " if self._best else ""
        return f"{best}trying {origin}, {fidelity.num_steps} steps"


def _with_rank_floor(problem: SearchProblem, floor_index: int) -> SearchProblem:
    """The same problem without ranks below a floor; groups that cannot reach it keep their largest rank."""
    space = problem.space
    bytes_table = problem.bytes_table.copy()
    for group_index in range(space.num_groups):
        floor = min(floor_index, space.num_ranks(group_index) - 1)
        bytes_table[group_index, :, :floor] = problem.budget_bytes + 1
    return replace(problem, bytes_table=bytes_table)


def _loss(trial: Trial) -> float:
    return math.inf if trial.loss is None else trial.loss


def _rank(trial: Trial) -> tuple[int, float]:
    """Sort key: more steps count for more, then the loss."""
    return -trial.fidelity.num_steps, _loss(trial)
