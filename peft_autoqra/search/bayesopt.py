"""Stage 2: Bayesian optimization around the incumbent, in a trust region, by discrete local search."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from peft_autoqra.importance.allocation import allocate
from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import fill
from peft_autoqra.search.embedding import OrdinalEmbedding
from peft_autoqra.search.gp_fit import one_thread
from peft_autoqra.search.loss_features import LossFeatures
from peft_autoqra.search.neighborhood import Positions, Region, keys, local_search
from peft_autoqra.search.operators import coupled_mutation, guided_mutation
from peft_autoqra.search.proxy_gp import Hyperparameters, LossData, ProxyGP
from peft_autoqra.search.trust_region import TrustRegionState, update_state
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate

logger = logging.getLogger(__name__)

MIN_OBSERVATIONS = 5  # with fewer there is no spread to learn from, and candidates are mutants of the incumbent
NUM_MUTANTS = 24
NUM_STARTS = 2
NUM_DRAWS = 1  # exact allocations of scores drawn from the posterior, beside that of their mean
REFIT_GROWTH = 1.2  # hyperparameters are fitted again when there are so many times the observations
MAX_FITTED = 64  # observations that hyperparameters are fitted to; predictions take all


class Observation(NamedTuple):
    """One evaluated candidate; a plain tuple will do.

    Attributes:
        candidate: ladder positions.
        loss: nats per token; None or NaN for a failed trial.
        standard_error: of the loss, nats per token; None where unknown.
        level: how many fidelities below the stage's own it was observed at; losses of another fidelity teach the
            model, and say nothing about the incumbent.
    """

    candidate: Candidate
    loss: float | None
    standard_error: float | None = None
    level: int = 0


ObservationLike = Observation | tuple[Candidate, float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class TrustRegionSettings:
    """How the trust region is searched.

    Attributes:
        num_trials: candidates asked for at most.
        improvement_tolerance: stop when no candidate's expected improvement is above it, in the unit of the losses
            (AutoQRA, Eq. 13).
        initial_length: most atomic edits between a candidate and the incumbent, at the start.
        max_length: most that it may grow to.
        success_tolerance: successful batches in a row after which the region doubles.
        failure_tolerance: failed batches in a row after which it halves; it collapses below one edit.
        seed: of the stage's own generator.
        in_nats: losses are in the unit of the problem's loss table.
    """

    num_trials: int = 24
    improvement_tolerance: float = 1e-4
    initial_length: int = 16
    max_length: int = 128
    success_tolerance: int = 2
    failure_tolerance: int = 3
    seed: int = 0
    in_nats: bool = True

    def __post_init__(self) -> None:
        """Check ranges; the trust region's own are checked by its state.

        Raises:
            ValueError: a value is out of its range.
        """
        if self.num_trials < 0 or self.improvement_tolerance < 0:
            raise ValueError(
                f"num_trials={self.num_trials} and improvement_tolerance={self.improvement_tolerance} must not be "
                "negative."
            )
        self.initial_state()

    def initial_state(self) -> TrustRegionState:
        """The trust region before the first trial."""
        return TrustRegionState(
            length=self.initial_length,
            max_length=self.max_length,
            success_tolerance=self.success_tolerance,
            failure_tolerance=self.failure_tolerance,
        )


class TrustRegionStage:
    """Ask for candidates, tell their losses, until ``is_done``.

    The loss is modelled as ``a + b * predicted + linear(features) + GP(embedding)`` with the additive proxy as prior
    mean, so that few observations suffice for what the proxy gets wrong; see :class:`ProxyGP`. Log expected
    improvement is maximized over feasible candidates of the region that were never asked for, by discrete local
    search from the incumbent, from mutants, and from exact allocations of the scores as the model corrects them; a
    batch one by one under the belief that those before it give their expected loss. A region that collapses is
    followed by another one around the exact allocation of scores drawn from the posterior (TuRBO's restart, keeping
    the observations). Equal arguments and equal tells give equal asks.

    Attributes:
        expected_losses: what the model made of the observed feasible candidates when it was asked last, nats per
            token: losses without their noise. Empty before.

    Args:
        problem: space, tables and budget.
        settings: see :class:`TrustRegionSettings`.
        observations: what is known already; they count as no trials. Infeasible ones teach the model only.
        pool: the only candidates that can be evaluated, where not all of the space can.
    """

    def __init__(
        self,
        problem: SearchProblem,
        settings: TrustRegionSettings,
        observations: Sequence[ObservationLike] = (),
        pool: Sequence[Candidate] = (),
    ) -> None:
        """Take over what is known; nothing is fitted yet."""
        self.problem, self.settings = problem, settings
        self.state = settings.initial_state()
        self.num_asked = 0
        self.num_restarts = 0
        self._importance = ImportancePriors.from_marginal_losses(problem)
        self._embedding = OrdinalEmbedding(problem, self._importance)
        self._features = LossFeatures(problem)
        self._rng = np.random.default_rng(settings.seed)
        self._observations: dict[tuple[Candidate, int], Observation] = {}
        self._pool = np.asarray(pool, dtype=np.int64)
        self._pending: list[Candidate] = []
        self._batch_losses: list[float] = []
        self._is_converged = False
        self._restart_centre: Candidate | None = None
        self._hyperparameters: Hyperparameters | None = None
        self._num_fitted = 0
        self.expected_losses: dict[Candidate, float] = {}
        self._record([Observation(*known) for known in observations])

    @property
    def incumbent(self) -> Candidate | None:
        """The feasible candidate with the least observed loss; None before any."""
        feasible = self._feasible()
        return min(feasible, key=_loss).candidate if feasible else None

    @property
    def is_done(self) -> bool:
        """Trials used up, or nothing promising enough left; ``ask`` then gives nothing."""
        return self.num_asked >= self.settings.num_trials or self._is_converged

    @one_thread()
    def ask(self, num: int = 1) -> list[Candidate]:
        """Up to ``num`` feasible candidates, none asked for or told before; fewer or none when the stage is done.

        May be called again before the last ones were told.
        """
        num = min(num, self.settings.num_trials - self.num_asked)
        if num < 1 or self.is_done:
            return []
        batch = self._propose_by_model(num) if self._has_enough() else self._propose_by_mutation(num)
        self._pending += batch
        self.num_asked += len(batch)
        self._is_converged = not batch
        return batch

    def tell(self, results: Sequence[ObservationLike]) -> None:
        """Record results; a failed one (loss None or NaN) is never asked for again and teaches nothing.

        The trust region moves on when all that was asked for has been told. Candidates evaluated elsewhere may be
        told too.

        Raises:
            ValueError: a candidate is off the ladders, or a standard error is negative.
        """
        told = [Observation(*result) for result in results]
        own = {known.candidate: known for known in told if known.level == 0}
        self._batch_losses += [_loss(own[candidate]) for candidate in self._pending if candidate in own]
        self._pending = [candidate for candidate in self._pending if candidate not in own]
        if not self._pending:
            if min(self._batch_losses, default=math.inf) < self.state.best_loss:
                self._restart_centre = None  # the incumbent is in the new region now
            self.state = update_state(self.state, self._batch_losses, self.settings.improvement_tolerance)
            self._batch_losses = []
        self._record(told)

    def _record(self, results: Sequence[Observation]) -> None:
        for known in results:
            if not self.problem.space.contains(known.candidate):
                raise ValueError(f"A candidate that was told is not on the ladders: {known.candidate[:4]}...")
            if known.standard_error is not None and known.standard_error < 0:
                raise ValueError(f"standard_error={known.standard_error} must not be negative.")
            self._observations[known.candidate, known.level] = known
            if known.level == 0 and self.problem.is_feasible(known.candidate):
                if self.expected_losses and math.isfinite(_loss(known)):
                    self.expected_losses[known.candidate] = _loss(known)  # until the model has seen it
                if not self._pending:
                    self.state = replace(self.state, best_loss=min(self.state.best_loss, _loss(known)))

    def _usable(self) -> list[Observation]:
        return [known for known in self._observations.values() if math.isfinite(_loss(known))]

    def _feasible(self) -> list[Observation]:
        return [known for known in self._usable() if known.level == 0 and self.problem.is_feasible(known.candidate)]

    def _has_enough(self) -> bool:
        return len(self._usable()) >= MIN_OBSERVATIONS and self.incumbent is not None

    def _centre(self) -> Candidate:
        """What the model expects most of, or where the region was started again; at first the incumbent.

        A candidate that was merely lucky is no centre. Before any there is the exact allocation on the proxy.
        """
        expected = min(self.expected_losses, key=self.expected_losses.__getitem__, default=None)
        return self._restart_centre or expected or self.incumbent or allocate(self.problem)

    def _region(self, batch: Sequence[Candidate]) -> Region:
        seen = [candidate for candidate, level in self._observations if level == 0]
        taken = [*seen, *self._pending, *batch]
        return Region(
            self.problem,
            self.problem.space.as_array(self._centre()),
            self.state.length,
            frozenset(keys(np.asarray(taken, dtype=np.int64))) if taken else frozenset(),
        )

    def _mutants(self, region: Region) -> Positions:
        """Candidates some mutations away from the centre, filled up to the budget; the centre first."""
        centre = self._centre()
        mutants = [centre]
        for index in range(NUM_MUTANTS):
            mutate = (coupled_mutation, guided_mutation)[index % 2]
            mutant = mutate(self.problem, self._importance, mutants[index // 2], self._rng)
            mutants.append(fill(self.problem, mutant, self._importance, self._rng))
        positions = np.asarray(mutants, dtype=np.int64)
        return positions[region.is_near(positions)]

    def _propose_by_mutation(self, num: int) -> list[Candidate]:
        """For want of observations, the mutants that the proxy likes best, then what else it likes nearby."""
        region = self._region([])
        mutants = np.unique(self._pool if len(self._pool) else self._mutants(region), axis=0)
        mutants = mutants[region.may_propose(mutants) if len(self._pool) else region.contains(mutants)]
        order = np.argsort(self._embedding.predicted_losses(mutants), kind="stable")[:num]
        batch = [self.problem.space.from_array(mutant) for mutant in mutants[order]]
        while len(batch) < num and not len(self._pool):
            found, value = local_search(self._region(batch), region.centre, self._negative_prediction)
            if value == -math.inf:
                break
            batch.append(self.problem.space.from_array(found))
        return batch

    def _negative_prediction(self, positions: Positions) -> npt.NDArray[np.float64]:
        return -self._embedding.predicted_losses(positions)

    def _propose_by_model(self, num: int) -> list[Candidate]:
        """Greedy batch of maximizers of the log expected improvement; ends early where there is none to speak of."""
        model = self._fit_model()
        if self.state.restart_triggered:
            self._restart(model)
        batch: list[Candidate] = []
        while len(batch) < num:
            found, value = self._maximize(model, self._region(batch))
            if value < math.log(max(self.settings.improvement_tolerance, 1e-300)):
                logger.info("Largest expected improvement %.1e nats: nothing further to try.", math.exp(value))
                break
            batch.append(self.problem.space.from_array(found))
            model.believe(found[None])
        return batch

    def _restart(self, model: ProxyGP) -> None:
        """A region of the first size around the exact allocation of corrected scores."""
        self.num_restarts += 1
        best_loss = self.state.best_loss
        self.state = replace(self.settings.initial_state(), best_loss=best_loss)
        self._restart_centre = self._corrected_allocation(model, self._rng)

    def _corrected_allocation(self, model: ProxyGP, rng: np.random.Generator | None) -> Candidate:
        return allocate(replace(self.problem, loss_table=model.corrected_table(rng)))

    def _fit_model(self) -> ProxyGP:
        usable = self._usable()
        if self._hyperparameters is None or len(usable) >= REFIT_GROWTH * self._num_fitted:
            least = sorted(usable, key=lambda known: known.level)[:MAX_FITTED]  # those of the stage's fidelity first
            self._hyperparameters, self._num_fitted = self._model(least, None).hyperparameters, len(usable)
        model = self._model(usable, self._hyperparameters)
        known = [seen.candidate for seen in self._feasible()]
        means = model.posterior(np.asarray(known, dtype=np.int64))[0].tolist()
        self.expected_losses = dict(zip(known, means, strict=True))
        if self._pending:
            model.believe(np.asarray(self._pending, dtype=np.int64))
        return model

    def _model(self, observations: Sequence[Observation], hyperparameters: Hyperparameters | None) -> ProxyGP:
        num_levels = 1 + max(known.level for known in self._observations.values())
        errors = [math.nan if known.standard_error is None else known.standard_error for known in observations]
        data = LossData(
            positions=np.asarray([known.candidate for known in observations], dtype=np.int64),
            losses=np.asarray([_loss(known) for known in observations]),
            standard_errors=np.asarray(errors),
            levels=np.asarray([num_levels - 1 - known.level for known in observations]),
            num_levels=num_levels,
            in_nats=self.settings.in_nats,
        )
        return ProxyGP(self._embedding, self._features, data, hyperparameters)

    def _maximize(self, model: ProxyGP, region: Region) -> tuple[npt.NDArray[np.int64], float]:
        """The best candidate of the region and its log expected improvement, log nats."""
        known = np.asarray([known.candidate for known in self._feasible()], dtype=np.int64)
        best_loss = float(model.posterior(known)[0].min())

        def score(positions: Positions) -> npt.NDArray[np.float64]:
            return model.log_expected_improvement(positions, best_loss)

        if len(self._pool):
            free = self._pool[region.may_propose(self._pool)]
            values = score(free) if len(free) else np.array([-math.inf])
            return (free if len(free) else self._pool)[int(values.argmax())], float(values.max())
        targets = [self._corrected_allocation(model, rng) for rng in (None, *[self._rng] * NUM_DRAWS)]
        allocated = [region.towards(self.problem.space.as_array(target), self._importance) for target in targets]
        starts = np.unique(np.concatenate([self._mutants(region), allocated]), axis=0)
        promising = np.argsort(-score(starts), kind="stable")[:NUM_STARTS]
        found = [local_search(region, start, score) for start in starts[promising]]
        return max(found, key=lambda pair: pair[1])


def _loss(known: Observation) -> float:
    """Observed loss, infinite where the trial failed."""
    return known.loss if known.loss is not None and math.isfinite(known.loss) else math.inf
