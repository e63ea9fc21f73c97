"""The whole search as ask and tell, over candidates, fidelities and seeds; knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from peft_autoqra.importance.warm_starts import (
    best_allocation,
    best_uniform,
    floored_allocations,
    smaller_allocations,
)
from peft_autoqra.search.bayesopt import Observation, TrustRegionSettings, TrustRegionStage
from peft_autoqra.search.evolution import EvolutionSettings, EvolutionStage
from peft_autoqra.search.ledger import Arm, Ledger, Outcome, Request
from peft_autoqra.search.phases import BatchPhase, Phase, TrustRegionPhase
from peft_autoqra.search.pool import CandidatePool
from peft_autoqra.search.spending import Spending
from peft_autoqra.search.surrogate import MIN_EXPENSIVE_RESULTS, PromotionSurrogate, SurrogateCheck
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

POPULATION_SIZE = 20
MIN_GENERATIONS = 3


@dataclass(frozen=True)
class Decision:
    """What a search would answer now.

    Attributes:
        winner: the best arm; the best that needs no search, where the best is not better beyond the 95% interval,
            which is widened for the number of searched plans that the best one is chosen from.
        variant: its learning rate, counted from 0.
        best: the arm with the least loss.
        num_seeds: training seeds that they were compared with.
    """

    winner: Arm
    variant: int
    best: Arm
    num_seeds: int


class SearchEngine:
    """Ask for evaluations, tell their outcomes, until ``is_done``; then ``decision``.

    Baselines first (exact allocation, best uniform candidate, plans from outside of the space); then warm starts and
    stage 1, evolution, at the cheapest fidelity; promotion of its best to higher fidelities by successive halving,
    where a surrogate decides who climbs if it ranks better than the cheap loss; stage 2, a trust region, at the last
    fidelity; and confirmation of the finalists and the best baseline with further seeds, by racing: who is worse
    beyond the interval gets no further seed. Costs are booked when a request is handed out and never exceed
    ``spending.total_cost``. A deterministic function of its arguments and of the order of asks and tells.

    Args:
        problem: space, tables and budget.
        spending: fidelities, their costs, and evaluations by stage.
        baselines: names of plans from outside of the space that are evaluated too.
        seed: of the stages.
        pool: the only candidates that can be evaluated, where not all of the space can.
        in_nats: losses are in the unit of the problem's loss table. Those of another objective may be of any scale and
            often equal, as accuracies of few examples are.
    """

    def __init__(
        self,
        problem: SearchProblem,
        spending: Spending,
        *,
        baselines: Sequence[str] = (),
        seed: int = 0,
        pool: Sequence[Candidate] = (),
        in_nats: bool = True,
    ) -> None:
        """Nothing is asked yet."""
        self.problem, self.spending, self._seed, self._in_nats = problem, spending, seed, in_nats
        self.ledger = Ledger(spending.level_costs, spending.total_cost, spending.max_trials)
        self.surrogate_checks: list[SurrogateCheck] = []
        self._pool = CandidatePool(problem, pool)
        self.allocation = self._pool.nearest(best_allocation(problem))
        uniform = best_uniform(problem)
        self.uniform = None if uniform is None else self._pool.nearest(uniform)
        self._external = tuple(baselines)
        top = self.ledger.top
        exploring: list[Phase] = [BatchPhase(self._warm_starts()), BatchPhase(self._evolve())]
        exploring += [BatchPhase(self._promote(level)) for level in range(1, top + 1)]
        self._local = self._explore()
        exploring.append(self._local)
        self._phases: list[Phase] = [BatchPhase(self._baselines()), *exploring, BatchPhase(self._confirm())]
        self._current = 0
        self._pending: dict[Request, Phase] = {}

    @property
    def is_done(self) -> bool:
        """Nothing is left to ask for, and nothing under way."""
        return not self._pending and self._current == len(self._phases)

    @property
    def pending(self) -> tuple[Request, ...]:
        """Handed out and not told yet, in order."""
        return tuple(self._pending)

    def ask(self, num: int = 1) -> list[Request]:
        """Up to ``num`` evaluations, none asked for before; fewer while outcomes of others have to be told first."""
        batch: list[Request] = []
        while len(batch) < num and self._current < len(self._phases):
            phase = self._phases[self._current]
            requests = phase.ask(num - len(batch))
            for request in requests:
                if self.ledger.was_asked(request) or not self._affords(request.level):
                    phase.tell(request)
                    continue
                self.ledger.book(request)
                self._pending[request] = phase
                batch.append(request)
            if not requests:
                if phase in self._pending.values():
                    break
                self._current += 1
        return batch

    def tell(self, request: Request, outcome: Outcome) -> None:
        """Record an outcome.

        Raises:
            ValueError: the request is not under way.
        """
        if request not in self._pending:
            raise ValueError(f"{request.origin} at level {request.level}, seed {request.seed} was not asked for.")
        self.ledger.record(request, outcome)
        self._pending.pop(request).tell(request)

    def finish(self) -> None:
        """Explore no further; what is left to ask for confirms the finalists."""
        self._current = max(self._current, len(self._phases) - 1)

    def decision(self) -> Decision | None:
        """The answer as things stand; None while nothing was evaluated at the last fidelity."""
        variants = {arm: self._variant(arm) for arm in self.ledger.arms(self.ledger.top)}
        num_seeds = {
            arm: self._num_seeds(arm, variant) for arm, variant in variants.items() if self._is_usable(arm, variant)
        }
        if not num_seeds:
            return None
        # a searched plan has to have something to compare with, so seeds that no baseline has do not count
        of_baselines = [num for arm, num in num_seeds.items() if not self._complexity(arm)]
        enough = min(max(num_seeds.values()), max(of_baselines, default=max(num_seeds.values())))
        losses = {
            arm: self.ledger.loss(arm, self.ledger.top, variants[arm], enough)
            for arm, num in num_seeds.items()
            if num >= enough
        }
        best = min(losses, key=losses.__getitem__)
        for arm in sorted(losses, key=lambda arm: (self._complexity(arm), losses[arm])):
            if not self._is_worse(arm, best, (variants[best], variants[arm])):
                return Decision(arm, variants[arm], best, enough)
        return Decision(best, variants[best], best, enough)

    @property
    def num_searched(self) -> int:
        """Searched candidates at the last fidelity, from which the best one is chosen."""
        return max(1, sum(self._complexity(arm) for arm in self.ledger.arms(self.ledger.top)))

    def _explore(self) -> TrustRegionPhase:
        top = self.ledger.top
        return TrustRegionPhase(
            self._trust_region, lambda candidate: self._observation(candidate, top), top, lambda: self._affords(top)
        )

    def _affords(self, level: int) -> bool:
        """Whether one more evaluation is within the budget; exploring leaves what confirmation needs."""
        is_exploring = 0 < self._current < len(self._phases) - 1
        return self.ledger.affords(level, self.spending.confirmation if is_exploring else (0.0, 0))

    def _baselines(self) -> Iterator[list[Request]]:
        top = self.ledger.top
        arms: list[Arm] = [self.allocation]
        if self.uniform is not None and self.uniform != self.allocation:
            arms.append(self.uniform)
        arms += self._external
        yield [Request(arm, top, "baseline") for arm in arms]

    def _warm_starts(self) -> Iterator[list[Request]]:
        """All that needs no search, where it is cheap; the allocation everywhere, to compare others with."""
        top = self.ledger.top
        yield [Request(self.allocation, level, "allocation") for level in range(top)]
        if not self.spending.num_warm:
            return
        known = [self.uniform, *floored_allocations(self.problem)]
        candidates = dict.fromkeys(self._pool.nearest(c) for c in known if c is not None)
        yield [Request(c, 0, "allocation") for c in list(candidates)[: self.spending.num_warm]]

    def _evolve(self) -> Iterator[list[Request]]:
        """Stage 1 at the cheapest fidelity, on the loss that the surrogate makes of it."""
        num = self.spending.num_evolved
        if num < 1:
            return
        size = max(2, min(POPULATION_SIZE, num // MIN_GENERATIONS))
        settings = EvolutionSettings(population_size=size, num_generations=1 + num // size, seed=self._seed)
        warm = self.ledger.candidates(0) if self.spending.num_warm else []
        seeds = [*warm, *smaller_allocations(self.problem)] if warm else []
        stage = EvolutionStage(self.problem, settings, seeds)
        stage.tell([(c, self.ledger.loss(c, 0)) for c in warm])
        surrogate = self._surrogate(0)
        while not stage.is_done and num > 0 and (batch := stage.ask()):
            taken = {c: self._pool.nearest(c, self.ledger.candidates(0)) for c in batch}
            requests = [
                Request(c, 0, "evolution") for c in dict.fromkeys(taken.values()) if self.problem.is_trainable(c)
            ]
            yield requests[:num]
            num -= len(requests)
            losses = surrogate.predict([(c, self.ledger.loss(c, 0)) for c in taken.values()])
            told = dict(zip(taken.values(), losses, strict=True))
            stage.tell([*((c, None) for c in batch if c not in told), *told.items()])

    def _promote(self, level: int) -> Iterator[list[Request]]:
        """The best of the fidelity below climb; of those who climb to the last, fewer."""
        num = self.spending.num_promoted[level - 1] if level <= len(self.spending.num_promoted) else 0
        below = self.ledger.candidates(level - 1)
        if num < 1 or not below:
            return
        pool = [(c, self.ledger.loss(c, level - 1)) for c in below if self.problem.is_trainable(c)]
        first = min(num, max(MIN_EXPENSIVE_RESULTS, num // 2))  # teaches the surrogate for the second half
        for part in (first, num - first):
            yield [Request(c, level, "evolution") for c in self._surrogate(level - 1).promote(pool, part)]

    def _surrogate(self, cheap_level: int) -> PromotionSurrogate:
        """Taught by what is known at a fidelity and at the one above it."""
        surrogate = PromotionSurrogate(self.problem, seed=self._seed)
        known = self.ledger.candidates(cheap_level + 1) if cheap_level < self.ledger.top else []
        pairs = [(c, self.ledger.loss(c, cheap_level), self.ledger.loss(c, cheap_level + 1)) for c in known]
        pairs = [pair for pair in pairs if math.isfinite(pair[1]) or not math.isfinite(pair[2])]
        surrogate.fit(pairs, may_correct=self.spending.trains_surrogate)
        if surrogate.check is not None:
            self.surrogate_checks.append(surrogate.check)
        return surrogate

    def _trust_region(self) -> TrustRegionStage:
        """Stage 2 with everything that is known."""
        settings = TrustRegionSettings(num_trials=self.spending.num_explored, seed=self._seed, in_nats=self._in_nats)
        if not self._in_nats:
            settings = replace(settings, improvement_tolerance=0.0)  # of its size nothing is known
        top = self.ledger.top
        known = [self._observation(c, level) for level in range(top + 1) for c in self.ledger.candidates(level)]
        return TrustRegionStage(self.problem, settings, known, pool=self._pool.candidates)

    def _observation(self, candidate: Candidate, level: int) -> Observation:
        """Loss relative to the allocation's, with the standard error of that difference."""
        top = self.ledger.top
        loss, reference = self.ledger.loss(candidate, level), self.ledger.loss(self.allocation, level)
        margin = self.ledger.difference(candidate, self.allocation, level)
        error = None if margin is None or candidate == self.allocation else margin.standard_error
        if error == 0 and not self._in_nats:  # the same answers to a few questions are not the same plan
            error = None
        if margin is not None and math.isfinite(reference):
            loss = reference + margin.mean
        return Observation(candidate, loss, error, top - level)

    def _confirm(self) -> Iterator[list[Request]]:
        """Learning rates, then further seeds, for the best and whoever may still be as good.

        Whoever misses a seed is out. The two that have to be compared in the end get all theirs, others what is left.
        """
        top, finalists, num_seeds = self.ledger.top, self._finalists(), self.spending.num_seeds
        variants = range(1, self.spending.num_variants)
        arms = list(dict.fromkeys([*self._contenders(finalists), *finalists]))
        num = self.ledger.num_affordable(top) - 2 * (num_seeds - 1)
        requests = [Request(arm, top, "confirmation", 0, variant) for arm in arms for variant in variants]
        yield requests[: max(0, num)]
        for seed in range(1, num_seeds):
            if self.ledger.num_affordable(top) < 2:  # half a comparison is none
                return
            num = self.ledger.num_affordable(top) - 2 * (num_seeds - 1 - seed)
            arms = self._contenders(arms)[: max(2, num)]
            yield [Request(arm, top, "confirmation", seed, self._variant(arm)) for arm in arms]

    def _finalists(self) -> list[Arm]:
        """The best searched candidates and the baselines."""
        top = self.ledger.top
        baselines = [arm for arm in (self.allocation, self.uniform, *self._external) if arm is not None]
        arms = self.ledger.arms(top)
        searched = sorted((arm for arm in arms if arm not in baselines), key=self._expected_loss)
        return [*searched[: self.spending.num_finalists], *(arm for arm in dict.fromkeys(baselines) if arm in arms)]

    def _expected_loss(self, arm: Arm) -> float:
        """At the last fidelity, without the noise of one run where stage 2 has a model of it."""
        observed, stage = self.ledger.loss(arm, self.ledger.top), self._local.stage
        return observed if stage is None or isinstance(arm, str) else stage.expected_losses.get(arm, observed)

    def _contenders(self, arms: list[Arm]) -> list[Arm]:
        """Best first; always the best one and the best simpler one, others while they may be as good; none failed."""
        losses = {arm: self._loss(arm, self._variant(arm)) for arm in arms}
        ordered = sorted((arm for arm in arms if math.isfinite(losses[arm])), key=losses.__getitem__)
        if not ordered:
            return []
        best = ordered[0]
        simpler = [arm for arm in ordered[1:] if self._complexity(arm) < self._complexity(best)] or ordered[1:]
        kept = [best, *simpler[:1]]
        return kept + [
            arm
            for arm in ordered
            if arm not in kept and not self._is_worse(arm, best, (self._variant(best), self._variant(arm)))
        ]

    def _is_worse(self, arm: Arm, best: Arm, variants: tuple[int, int]) -> bool:
        margin = self.ledger.difference(best, arm, self.ledger.top, variants)
        return arm != best and margin is not None and margin.is_better(self.num_searched)

    def _is_usable(self, arm: Arm, variant: int) -> bool:
        return math.isfinite(self._loss(arm, variant))

    def _loss(self, arm: Arm, variant: int) -> float:
        return self.ledger.loss(arm, self.ledger.top, variant)

    def _variant(self, arm: Arm) -> int:
        return self.ledger.best_variant(arm, self.ledger.top, self.spending.num_variants)

    def _num_seeds(self, arm: Arm, variant: int) -> int:
        return self.ledger.num_seeds(arm, self.ledger.top, variant)

    def _complexity(self, arm: Arm) -> int:
        """0 for what needs no search, 1 for what was searched."""
        return 0 if isinstance(arm, str) or arm in (self.uniform, self.allocation) else 1
