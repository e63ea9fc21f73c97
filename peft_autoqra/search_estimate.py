"""What a search will take, before it is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from peft_autoqra.importance.calibration import forward_backward
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.search_ladder import Ladder
from peft_autoqra.search_setup import SearchSetup


@dataclass(frozen=True, kw_only=True)
class SearchEstimate:
    """What a search will take.

    Attributes:
        budget_bytes: the limit.
        budget_scope: what it limits.
        smallest_bytes: of the smallest plan in the search space that has an adapter.
        uniform: bits to the memory of uniform bits at rank 16.
        ladder: fidelities of the trials, how many of each, and their costs.
        full_steps: of one full fine-tune.
        max_cost: of the search, calibration included, in units of one full fine-tune.
        full_seconds: estimated time of one full fine-tune on the unquantized model.
        objective: what trials are scored by.
    """

    budget_bytes: int
    budget_scope: str
    smallest_bytes: int
    uniform: dict[int, MemoryEstimate]
    ladder: Ladder
    full_steps: int
    max_cost: float
    full_seconds: float
    objective: ObjectiveInfo = HELD_OUT_LOSS


def estimate_search(setup: SearchSetup) -> SearchEstimate:
    """From memory arithmetic and one timed forward and backward pass; trains nothing.

    Raises:
        SearchBudgetError: ``max_cost`` does not suffice for the baselines.
        CalibrationError: values that are not finite.
    """
    memory = setup.memory_model
    return SearchEstimate(
        budget_bytes=setup.budget.limit_bytes,
        budget_scope=setup.budget.scope,
        smallest_bytes=setup.problem_with(setup.zero_table()).smallest_trainable_bytes,
        uniform={bits: memory.estimate(memory.uniform(bits, 16), setup.quantizer) for bits in setup.space.bit_choices},
        ladder=setup.ladder(),
        full_steps=setup.costs.full_steps,
        max_cost=setup.config.max_cost,
        full_seconds=setup.costs.full_steps * _step_seconds(setup),
        objective=setup.objective_info,
    )


def _step_seconds(setup: SearchSetup) -> float:
    """Seconds of the forward and backward passes of one training step."""
    args = setup.args
    num_sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batches = setup.data.batches(setup.data.train, num_sequences)
    return _seconds_of(partial(forward_backward, setup.model, batches))


def _seconds_of(action: Callable[[], object]) -> float:
    """Seconds of the second of two calls; the first warms up."""
    action()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
