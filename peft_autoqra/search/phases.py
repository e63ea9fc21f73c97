"""Phases of a search: each asks for evaluations until it has nothing left to ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from peft_autoqra.search.bayesopt import Observation, TrustRegionStage
from peft_autoqra.search.ledger import Request
from peft_autoqra.search_space import Candidate


class Phase(Protocol):
    """Asks and is told; one that asks for nothing while nothing of it is under way is over."""

    def ask(self, num: int) -> list[Request]:
        """Up to ``num`` requests; fewer while others have to be told first."""
        ...

    def tell(self, request: Request) -> None:
        """The outcome of a request is in the ledger, or the request cannot be afforded."""
        ...


class BatchPhase:
    """Batches from a generator, which goes on when all of a batch was told.

    Args:
        batches: yields requests; reads their outcomes from the ledger.
    """

    def __init__(self, batches: Iterator[Sequence[Request]]) -> None:
        """Nothing is asked yet."""
        self._batches = batches
        self._queue: list[Request] = []
        self._pending: list[Request] = []

    def ask(self, num: int) -> list[Request]:
        """The next requests of the batch under way; of the next batch when that is done."""
        while not self._queue and not self._pending:
            batch = next(self._batches, None)
            if batch is None:
                return []
            self._queue = list(batch)
        taken, self._queue = self._queue[:num], self._queue[num:]
        self._pending += taken
        return taken

    def tell(self, request: Request) -> None:
        """One less to wait for."""
        self._pending.remove(request)


class TrustRegionPhase:
    """Stage 2 at the most expensive fidelity; may be asked while results are outstanding.

    Args:
        make_stage: called when the phase begins, with all that is known then.
        observe: the stage's view of one told candidate.
        level: the fidelity.
        affords: whether one more evaluation is within the budget; without that the phase is over.
    """

    def __init__(
        self,
        make_stage: Callable[[], TrustRegionStage],
        observe: Callable[[Candidate], Observation],
        level: int,
        affords: Callable[[], bool],
    ) -> None:
        """Nothing is known yet."""
        self._make_stage, self._observe, self._level, self._affords = make_stage, observe, level, affords
        self.stage: TrustRegionStage | None = None

    def ask(self, num: int) -> list[Request]:
        """The stage's next candidates."""
        if not self._affords():
            return []
        self.stage = self.stage or self._make_stage()
        return [Request(candidate, self._level, "trust_region") for candidate in self.stage.ask(num)]

    def tell(self, request: Request) -> None:
        """Pass it on."""
        if self.stage is not None and not isinstance(request.arm, str):
            self.stage.tell([self._observe(request.arm)])
