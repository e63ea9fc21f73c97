"""A search on workers that take simulated time: the real engine is asked and told, events come in order of time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peft_autoqra.search.ledger import Outcome, Request


class Asked(Protocol):
    """What is searched with: :class:`~peft_autoqra.search.engine.SearchEngine`, or a stand-in of the tests."""

    def ask(self, num: int) -> Sequence[Request]:
        """Up to ``num`` requests; none while others have to be told first, or at the end."""
        ...

    def tell(self, request: Request, outcome: Outcome) -> None:
        """The outcome of one."""
        ...


@dataclass(frozen=True)
class SimulatedTrial:
    """One evaluation.

    Attributes:
        request: what was evaluated.
        worker: where.
        start_seconds: since the search began.
        end_seconds: likewise.
    """

    request: Request
    worker: int
    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end_seconds - self.start_seconds


def simulate(
    engine: Asked,
    num_workers: int,
    seconds: Callable[[Request], float],
    outcome: Callable[[Request], Outcome],
    *,
    begin_seconds: float = 0.0,
    asking_seconds: float = 0.0,
) -> list[SimulatedTrial]:
    """Give free workers what the engine asks for, until it asks for nothing more.

    Args:
        engine: of the search.
        num_workers: that evaluate one request at a time each.
        seconds: duration of a request's evaluation.
        outcome: what it gives.
        begin_seconds: when the first request can be asked for; until then calibration runs.
        asking_seconds: that the one process which asks needs for each request. What ends meanwhile waits.

    Returns:
        The evaluations in the order of their end.
    """
    clock, order = begin_seconds, 0
    free = list(range(num_workers))
    running: list[tuple[float, int, SimulatedTrial]] = []
    ended: list[SimulatedTrial] = []
    while True:
        for request in engine.ask(len(free)) if free else ():
            clock += asking_seconds
            trial = SimulatedTrial(request, heapq.heappop(free), clock, clock + seconds(request))
            heapq.heappush(running, (trial.end_seconds, order, trial))
            order += 1
        if not running:
            return ended
        clock = max(clock, running[0][0])
        while running and running[0][0] <= clock:
            trial = heapq.heappop(running)[2]
            engine.tell(trial.request, outcome(trial.request))
            heapq.heappush(free, trial.worker)
            ended.append(trial)
