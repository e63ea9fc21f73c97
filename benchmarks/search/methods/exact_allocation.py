"""The exact allocation of the proxy, evaluated once: what anyone has without a search."""

from __future__ import annotations

from benchmarks.search.run import Run, until_spent
from peft_autoqra.importance.allocation import allocate


@until_spent
def exact_allocation(run: Run, seed: int) -> None:
    """One evaluation; nothing is random."""
    run.evaluate(allocate(run.problem))
