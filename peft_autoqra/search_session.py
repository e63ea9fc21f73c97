"""A search under way: trials asked for and told, each in the log before it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from peft_autoqra.errors import SearchStateError
from peft_autoqra.plan import BitRankPlan, QuantizerSettings
from peft_autoqra.search.engine import Decision, SearchEngine
from peft_autoqra.search.ledger import Arm, Outcome, Request
from peft_autoqra.search_ladder import Ladder
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_setup import SearchSetup
from peft_autoqra.trial import Trial, TrialResult, TrialStatus
from peft_autoqra.trial_log import Asked, Finished, TrialLog

QLORA = "qlora-4bit"
QLORA_RANK = 16


class SearchSession:
    """The engine's requests as trials of plans. A log that holds a part of the search is replayed.

    Args:
        setup: model, data and budget.
        problem: with the calibrated loss table.
        ladder: fidelities and spending.
        log: of this search.

    Raises:
        SearchStateError: the log holds trials that this search would not ask for.
    """

    def __init__(self, setup: SearchSetup, problem: SearchProblem, ladder: Ladder, log: TrialLog) -> None:
        """Take over what the log holds."""
        self.setup, self.problem, self.ladder, self.log = setup, problem, ladder, log
        self.external = external_plans(setup)
        self.engine = SearchEngine(
            problem,
            ladder.spending,
            baselines=tuple(self.external),
            seed=setup.config.seed,
            in_nats=setup.objective is None,
        )
        self._requests: list[Request] = []
        self._plans: dict[Arm, BitRankPlan] = {}
        self._waiting: list[int] = []
        for event in log.events:
            if isinstance(event, Asked):
                self._waiting += self._take(event.num)
            elif isinstance(event, Finished):
                self.engine.finish()
            else:
                self._replay(event)

    @property
    def is_done(self) -> bool:
        """Every trial was told, and nothing is left to ask for."""
        return self.engine.is_done

    @property
    def cost(self) -> float:
        """Booked so far, calibration included, in units of one full fine-tune."""
        return self.ladder.calibration_cost + self.engine.ledger.spent

    def ask(self, num: int = 1) -> list[Trial]:
        """Up to ``num`` trials to be evaluated.

        Those that a stopped search left open come first and by themselves, so that a loop that asks as it did before
        gets the trials that it would have got.
        """
        numbers, self._waiting = self._waiting[:num], self._waiting[num:]
        if not numbers and num > 0 and not self.is_done:
            numbers = self._take(num)
            self.log.add(Asked(num))  # also where nothing came: the stages' generators have moved
        return [self._trial(number) for number in numbers]

    def tell(self, trial: Trial, result: TrialResult) -> Trial:
        """Log a result, then take it into account.

        Raises:
            SearchStateError: the trial was not asked for, or was told already.
            ValueError: a completed trial without a finite loss, or a failed one with a loss.
        """
        request = self._request(trial)
        is_usable = result.loss is not None and math.isfinite(result.loss)
        if is_usable != (result.status is TrialStatus.COMPLETED):
            raise ValueError(f"A trial that is {result.status.value} cannot have loss={result.loss}.")
        told = self._trial(trial.number, result)
        self.log.add(told)
        if trial.number in self._waiting:  # evaluated by what outlived the stopped search
            self._waiting.remove(trial.number)
        self.engine.tell(request, _outcome(result))
        return told

    def finish(self) -> None:
        """Explore no further; only the finalists are still confirmed."""
        self.log.add(Finished())
        self.engine.finish()

    def decision(self) -> Decision:
        """The answer.

        Raises:
            SearchStateError: nothing was run at the last fidelity yet, or every plan failed there with some seed.
        """
        decision = self.engine.decision()
        if decision is None:
            errors = {trial.result.error for trial in self.log.trials if trial.result and trial.result.error}
            if not errors:
                raise SearchStateError(
                    f"No trial of {self.ladder.final.num_steps} steps was run yet; give the search more max_seconds."
                )
            raise SearchStateError(
                f"No plan came through all its trials of {self.ladder.final.num_steps} steps: {errors}. Mend the "
                f"cause, then use another output_dir or delete {self.log.path}, which remembers the failures; "
                "calibration is kept."
            )
        return decision

    def trials_of(self, arm: Arm, variant: int) -> list[Trial]:
        """The trials of an arm at the last fidelity, by seed."""
        wanted = (arm, self.engine.ledger.top, variant)
        found = [
            (request.seed, trial)
            for trial in self.log.trials
            if (request := self._requests[trial.number]) and (request.arm, request.level, request.variant) == wanted
        ]
        return [self._trial(trial.number, trial.result) for _, trial in sorted(found, key=lambda pair: pair[0])]

    def variant(self, arm: Arm) -> int:
        """The learning rate that an arm did best with."""
        engine = self.engine
        return engine.ledger.best_variant(arm, engine.ledger.top, engine.spending.num_variants)

    def trials_at(self, level: int) -> list[Trial]:
        """The trials of one fidelity at the first seed and the recipe's learning rate."""
        return [
            self._trial(trial.number, trial.result)
            for trial in self.log.trials
            if (request := self._requests[trial.number])
            and (request.level, request.seed, request.variant) == (level, 0, 0)
        ]

    def best_searched(self) -> Arm | None:
        """The searched plan with the least loss among those with the most seeds; None where none was tried."""
        engine, top = self.engine, self.engine.ledger.top
        baselines = set(self.baselines().values())
        arms = [arm for arm in engine.ledger.arms(top) if arm not in baselines]
        if not arms:
            return None
        return min(arms, key=lambda arm: (-engine.ledger.num_seeds(arm, top, self.variant(arm)), self._loss(arm)))

    def _loss(self, arm: Arm) -> float:
        return self.engine.ledger.loss(arm, self.engine.ledger.top, self.variant(arm))

    def baselines(self) -> dict[str, Arm]:
        """Plans that need no search, by name."""
        named: dict[str, Arm] = {"allocation": self.engine.allocation}
        if self.engine.uniform is not None:
            named["uniform"] = self.engine.uniform
        return named | {name: name for name in self.external}

    def plan(self, arm: Arm) -> BitRankPlan:
        """The plan of an arm."""
        if arm not in self._plans:
            self._plans[arm] = self.external[arm] if isinstance(arm, str) else self.setup.searched_plan(arm)
        return self._plans[arm]

    def _take(self, num: int) -> list[int]:
        first = len(self._requests)
        self._requests += self.engine.ask(num)
        return list(range(first, len(self._requests)))

    def _trial(self, number: int, result: TrialResult | None = None) -> Trial:
        request = self._requests[number]
        plan, fidelity = self.plan(request.arm), self.ladder.fidelity(request)
        return Trial(
            number=number,
            origin=f"{request.origin}:{request.arm}" if isinstance(request.arm, str) else request.origin,
            plan=plan,
            fidelity=fidelity,
            total_bytes=plan.memory.in_scope(self.setup.budget.scope) if plan.memory else 0,
            cost=self.engine.ledger.level_costs[request.level],
            result=result,
        )

    def _request(self, trial: Trial) -> Request:
        request = self._requests[trial.number] if 0 <= trial.number < len(self._requests) else None
        is_same = (
            request is not None
            and request in self.engine.pending
            and trial.plan.digest == self.plan(request.arm).digest
            and trial.fidelity == self.ladder.fidelity(request)
        )
        if request is None or not is_same:
            raise SearchStateError(
                f"Trial {trial.number} ({trial.origin}) is not under way: it was told already, or another search "
                "asked for it."
            )
        return request

    def _replay(self, event: Trial) -> None:
        try:
            request = self._request(event)
        except SearchStateError as error:
            raise SearchStateError(
                f"Trial {event.number} of {self.log.path} is not one that this search would ask for; it was written "
                "by another version. Use another output_dir."
            ) from error
        self._waiting.remove(event.number)
        self.engine.tell(request, _outcome(event.result) if event.result else Outcome(None))


def _outcome(result: TrialResult) -> Outcome:
    """With the loss that margins are of: sequences count alike, where they are known."""
    losses = result.sequence_losses
    if result.loss is None or not losses:
        return Outcome(result.loss, losses)
    return Outcome(sum(losses) / len(losses), losses)


def external_plans(setup: SearchSetup) -> Mapping[str, BitRankPlan]:
    """Baselines from outside of the search space: uniform 4-bit QLoRA, where it fits the budget."""
    quantizer = QuantizerSettings(backend="bitsandbytes")
    for rank in range(QLORA_RANK, 0, -1):
        plan = setup.plan(setup.memory_model.uniform(4, rank), quantizer, compensate=False)
        if plan.memory and plan.memory.in_scope(setup.budget.scope) <= setup.budget.limit_bytes:
            return {QLORA: plan}
    return {}
