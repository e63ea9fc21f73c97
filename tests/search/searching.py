"""Whole searches on synthetic problems."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from peft_autoqra.search.engine import SearchEngine
from peft_autoqra.search.ledger import Outcome, Request
from peft_autoqra.search_problem import SearchProblem
from tests.search.synthetic import InteractingTruth

NUM_SEQUENCES = 8


@dataclass
class Landscape:
    """What evaluations give: a bias at cheap fidelities, noise by sequence and by seed, the same for equal requests.

    Each fidelity below the top has mis-scored groups of its own. Names stand for losses in ``named``.
    """

    problem: SearchProblem
    top: int
    noise: float = 0.0
    seed_noise: float = 0.0
    named: dict[str, float] = field(default_factory=dict)

    def true_loss(self, arm, level=None) -> float:
        if isinstance(arm, str):
            return self.named[arm]
        level = self.top if level is None else level
        return InteractingTruth(self.problem, seed=0 if level == self.top else 10 + level)(arm)

    def __call__(self, request: Request) -> Outcome:
        digest = zlib.crc32(repr((request.arm, request.level, request.seed, request.variant)).encode())
        rng = np.random.default_rng(digest)
        shared = np.random.default_rng(7).normal(size=NUM_SEQUENCES)  # hard and easy sequences
        own = self.noise * rng.normal(size=NUM_SEQUENCES) + self.seed_noise * rng.normal()
        losses = self.true_loss(request.arm, request.level) + shared + own
        return Outcome(float(losses.mean()), tuple(losses.tolist()))


def run(engine: SearchEngine, evaluate, *, num: int = 1, order=None, limit: int = 5000) -> list[Request]:
    """Ask and tell until the search is over; the requests in the order of asking.

    Args:
        order: of telling a batch; as asked by default.
    """
    asked: list[Request] = []
    while not engine.is_done:
        batch = engine.ask(num)
        assert batch or engine.is_done, "nothing to evaluate, nothing under way, and not done"
        asked += batch
        for request in order(batch) if order else batch:
            engine.tell(request, evaluate(request))
        assert len(asked) < limit
    return asked
