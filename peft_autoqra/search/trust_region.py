"""Trust region as state plus pure update (TuRBO, Eriksson et al. 2019, arXiv 1910.01739), for ladders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class TrustRegionState:
    """How far from the incumbent candidates may lie, and how it has been going.

    Attributes:
        length: most atomic edits (one rung on one ladder of one group) between a candidate and the centre.
        min_length: below it the region has collapsed.
        max_length: growth ends here.
        success_counter: batches in a row that improved.
        failure_counter: batches in a row that did not.
        success_tolerance: successes in a row after which the length doubles.
        failure_tolerance: failures in a row after which the length halves.
        best_loss: least loss so far, nats per token.
        restart_triggered: the region has collapsed; start another one or stop.
    """

    length: float = 8.0
    min_length: float = 1.0
    max_length: float = 64.0
    success_counter: int = 0
    failure_counter: int = 0
    success_tolerance: int = 2
    failure_tolerance: int = 3
    best_loss: float = float("inf")
    restart_triggered: bool = False

    def __post_init__(self) -> None:
        """Check ranges; a collapsed region may be shorter than its minimum.

        Raises:
            ValueError: lengths out of order or a tolerance below one.
        """
        if not 0 < self.min_length <= self.max_length or not 0 < self.length <= self.max_length:
            raise ValueError(
                f"length={self.length}, min_length={self.min_length}, max_length={self.max_length} must be positive, "
                "neither of the first two above the last."
            )
        if min(self.success_tolerance, self.failure_tolerance) < 1:
            raise ValueError("success_tolerance and failure_tolerance must be at least 1.")


def update_state(state: TrustRegionState, losses: Sequence[float], min_improvement: float = 1e-4) -> TrustRegionState:
    """The state after one batch.

    Args:
        state: before the batch.
        losses: of the batch's candidates, nats per token; failed ones as infinity. Empty batches change nothing.
        min_improvement: a batch succeeds when it lowers the best loss by more than this, nats per token.
    """
    if not losses:
        return state
    success = min(losses) < state.best_loss - min_improvement
    successes = state.success_counter + 1 if success else 0
    failures = 0 if success else state.failure_counter + 1
    length = state.length
    if successes == state.success_tolerance:
        length, successes = min(2.0 * length, state.max_length), 0
    elif failures == state.failure_tolerance:
        length, failures = length / 2.0, 0
    return replace(
        state,
        length=length,
        success_counter=successes,
        failure_counter=failures,
        best_loss=min(state.best_loss, *losses),
        restart_triggered=length < state.min_length,
    )
