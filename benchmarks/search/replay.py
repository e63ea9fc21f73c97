"""Recorded fine-tunes as an environment: proposals are snapped to plans that were measured."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from benchmarks.search.environment import Evaluation
from peft_autoqra.importance.rank_demand import rank_demand
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate, ModuleGroup, SearchSpace

LEVEL_STEPS = (0, 4, 12)
STEP_TOKENS = 256  # a training step of scripts/record_trials.py: 4 sequences of 64 tokens
NUM_SEARCH_SEQUENCES = 24  # of the held-out 48; the search never sees the others
SEQUENCE_TOKENS = 64 / 2  # a held-out sequence in training tokens: a forward pass costs about half of a step's


@dataclass(frozen=True, eq=False)
class ReplayEnvironment:
    """Plans of one budget that were trained, with their losses along the run.

    A proposal is replaced by the nearest plan of the pool that the run has not evaluated at that level and seed. The
    distance is the L1 distance of ladder positions in bytes: what changing the bits of the groups that differ would
    move, plus the same for their ranks. It needs no estimate of losses, so a method without a proxy is given none.

    One training seed was recorded, so the seed of an evaluation changes nothing.

    Attributes:
        name: of the budget.
        problem: space, exact bytes, proxy, budget.
        pool: the recorded plans, all within the budget.
        sequence_losses: nats per token, ``[num_levels, len(pool), num_sequences]``.
        num_seeds: that were recorded.
    """

    name: str
    problem: SearchProblem
    pool: tuple[Candidate, ...]
    sequence_losses: npt.NDArray[np.float64]
    num_seeds: int = 1

    @cached_property
    def level_costs(self) -> tuple[float, ...]:
        """Tokens trained and, in their measure, evaluated; of the highest level's."""
        tokens = [steps * STEP_TOKENS + NUM_SEARCH_SEQUENCES * SEQUENCE_TOKENS for steps in LEVEL_STEPS]
        return tuple(count / tokens[-1] for count in tokens)

    def resolve(self, candidate: Candidate, taken: Set[Candidate]) -> Candidate | None:
        """The nearest plan of the pool that is not taken, the first of equals; None where all are."""
        distances = np.abs(self._pool_bytes - self._bytes([candidate])).sum(axis=1)
        order = np.argsort(distances, kind="stable").tolist()
        return next((self.pool[index] for index in order if self.pool[index] not in taken), None)

    def evaluate(self, candidate: Candidate, level: int, seed: int = 0) -> Evaluation:
        """What was recorded after the level's steps, on the sequences that a search sees."""
        losses = self.sequence_losses[level, self._indices[candidate], :NUM_SEARCH_SEQUENCES]
        return Evaluation(float(losses.mean()), tuple(losses.tolist()))

    def true_loss(self, candidate: Candidate) -> float:
        """Mean over all held-out sequences after all steps, nats per token."""
        return float(self.sequence_losses[-1, self._indices[candidate]].mean())

    @cached_property
    def optimum_loss(self) -> float:
        """Least true loss of the pool, nats per token."""
        return min(map(self.true_loss, self.pool))

    @cached_property
    def _indices(self) -> dict[Candidate, int]:
        return {candidate: index for index, candidate in enumerate(self.pool)}

    @cached_property
    def _pool_bytes(self) -> npt.NDArray[np.int64]:
        return self._bytes(self.pool)

    def _bytes(self, candidates: tuple[Candidate, ...] | list[Candidate]) -> npt.NDArray[np.int64]:
        """Bytes of every group's bits and of its rank, ``[num_candidates, 2 * num_groups]``."""
        positions, table = np.asarray(candidates, dtype=np.int64), self.problem.bytes_table
        groups = np.arange(len(table))
        columns = [table[groups, positions[..., 0], 0], table[groups, 0, positions[..., 1]] - table[groups, 0, 0]]
        return np.concatenate(columns, axis=1)


def load_replays(folder: Path) -> dict[str, ReplayEnvironment]:
    """Every budget of a recorded table, ``real-`` and its name to its environment.

    Args:
        folder: with ``problems.safetensors`` and ``trials-*.jsonl`` of ``scripts/record_trials.py``; the recording
            may still go on.

    Raises:
        FileNotFoundError: the folder holds no such table.
    """
    problems = _read_problems(folder / "problems.safetensors")
    lines = [line for path in sorted(folder.glob("trials-*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    rows = sorted(map(json.loads, lines), key=lambda row: row["index"])
    budgets = {budget: [row for row in rows if row["budget"] == budget] for budget in problems}
    return {f"real-{b}": _environment(f"real-{b}", problems[b], table) for b, table in budgets.items() if table}


def _environment(name: str, problem: SearchProblem, rows: list[dict[str, Any]]) -> ReplayEnvironment:
    pool = tuple(tuple(zip(map(int, row["bits"]), map(int, row["ranks"]), strict=True)) for row in rows)
    losses = [[row["sequence_losses"][str(steps)] for row in rows] for steps in LEVEL_STEPS]
    return ReplayEnvironment(name, problem, pool, np.array(losses))


def _read_problems(path: Path) -> dict[str, SearchProblem]:
    with safe_open(path, framework="np") as file:
        content = json.loads(file.metadata()["problem"])
        sizes, losses = file.get_tensor("bytes"), file.get_tensor("losses")
    groups = tuple(ModuleGroup(name, (name,), max_rank) for name, max_rank in content["groups"])
    space = SearchSpace(groups, tuple(content["bit_choices"]), tuple(content["rank_choices"]))
    largest = int(sizes.max(axis=(1, 2)).sum()) + content["fixed_bytes"]
    problem = SearchProblem(space, sizes, losses + rank_demand(space)[:, None, :], content["fixed_bytes"], largest)
    return {name: replace(problem, budget_bytes=budget) for name, budget in content["budgets"].items()}
