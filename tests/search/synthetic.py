"""Synthetic problems and truths: an additive proxy that a model-like function departs from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate, ModuleGroup, SearchSpace


def make_space(num_groups, bit_choices=(2, 3, 4, 8, 16), rank_choices=(0, 4, 8, 16, 32, 64), max_rank=64):
    groups = tuple(ModuleGroup(f"layer.{i}", (f"layer.{i}.linear",), max_rank) for i in range(num_groups))
    return SearchSpace(groups, tuple(bit_choices), tuple(rank_choices))


def make_problem(num_groups=16, seed=0, budget_fraction=0.3, **space_kwargs):
    """Model-like tables: error falls fourfold per bit, an adapter removes part of it, sensitivities are heavy-tailed.

    The budget lies at `budget_fraction` between uniform 2 bits and uniform 8 bits without adapters, where the space
    has those, else between the smallest and the largest candidate.
    """
    rng = np.random.default_rng(seed)
    space = make_space(num_groups, **space_kwargs)
    num_weights = rng.choice([576 * 576, 576 * 192, 576 * 1536], size=num_groups)
    bits, ranks = np.array(space.bit_choices), np.array(space.rank_choices)
    sensitivity = rng.lognormal(0.0, 1.2, size=num_groups) * 8.0 / num_groups
    removable = rng.uniform(0.2, 0.7, size=num_groups)
    demand = rng.lognormal(-1.5, 1.0, size=num_groups) / num_groups
    left = 1 - removable[:, None] * ranks / (ranks + 16.0)
    error = np.where(bits < 16, 4.0 ** -(bits - 1.0), 0.0)
    loss = sensitivity[:, None, None] * error[None, :, None] * left[:, None, :]
    loss = loss + (demand[:, None] * np.exp(-ranks / 16.0))[:, None, :]
    sizes = num_weights[:, None, None] * bits[None, :, None] // 8
    sizes = sizes + (np.sqrt(num_weights).astype(np.int64)[:, None] * 2 * 16 * ranks)[:, None, :]
    sizes = sizes.astype(np.int64)
    allowed = space.allowed_choices()
    low = int(np.where(allowed, sizes, np.iinfo(np.int64).max).min(axis=(1, 2)).sum())
    high = int(num_weights.sum()) if 8 in bits else int(np.where(allowed, sizes, 0).max(axis=(1, 2)).sum())
    budget = low + int(budget_fraction * max(0, high - low))
    return SearchProblem(space, sizes, loss, fixed_bytes=1000, budget_bytes=budget + 1000)


@dataclass
class InteractingTruth:
    """Truth that departs from the proxy: groups mis-scored, rungs mis-scored, neighbours that harm each other.

    true = base + sum_g k_g m_b loss_g + strength * sum_g sqrt(loss_g loss_{g+1}) c_g, m_b by bit rung.
    """

    problem: SearchProblem
    seed: int = 0
    mis_scoring: float = 0.4
    strength: float = 1.0
    noise: float = 0.0
    num_calls: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(1000 + self.seed)
        num_groups = self.problem.space.num_groups
        self.group_factor = rng.lognormal(0.0, self.mis_scoring, size=num_groups)
        num_bits = len(self.problem.space.bit_choices)
        self.rung_factor = np.exp(rng.normal(0, self.mis_scoring, size=num_bits))
        self.coupling = rng.uniform(0, 1, size=num_groups - 1) * self.strength
        self.noise_rng = np.random.default_rng(seed=self.seed)

    def __call__(self, candidate: Candidate) -> float:
        self.num_calls += 1
        positions = self.problem.space.as_array(candidate)
        rows = np.arange(len(positions))
        losses = self.problem.loss_table[rows, positions[:, 0], positions[:, 1]]
        own = (self.group_factor * self.rung_factor[positions[:, 0]] * losses).sum()
        pairs = (self.coupling * np.sqrt(np.abs(losses[:-1] * losses[1:]))).sum()
        return float(3.0 + own + pairs + self.noise * self.noise_rng.normal())


def brute_force(problem, objective):
    """Best feasible candidate and its objective, by enumeration."""
    space = problem.space
    choices = [
        list(itertools.product(range(len(space.bit_choices)), range(space.num_ranks(g))))
        for g in range(space.num_groups)
    ]
    feasible = (c for c in itertools.product(*choices) if problem.total_bytes(c) <= problem.budget_bytes)
    return min(((objective(c), c) for c in feasible), key=lambda pair: pair[0])
