"""Synthetic landscapes: model-like problems whose truth departs from the proxy in known ways, with exact optimum."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from benchmarks.search.chain_optimum import chain_optimum
from benchmarks.search.environment import Evaluation
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate, ModuleGroup, SearchSpace

Array = npt.NDArray[np.float64]

BIT_CHOICES = (2, 3, 4, 8)
RANK_CHOICES = (0, 4, 8, 16, 32)
UNIT_BYTES = 131_072  # all sizes are multiples of it, so that the budget has some thousand units
FIXED_BYTES = 1_000 * UNIT_BYTES
# Units that a bit, and four ranks, take: rank 16 is about a quarter of a bit, as 16-bit adapters at hidden size 2048.
KIND_UNITS = {"self_attn": (16, 1), "mlp": (48, 2)}
BASE_LOSS = 3.0
NUM_SEQUENCES = 32


@dataclass(frozen=True)
class Noise:
    """Standard deviations of what evaluations add to the truth, nats per token.

    Attributes:
        offset: of a sequence's own difficulty, the same for all candidates and levels; sums to zero over sequences.
        sequence: of each sequence of each evaluation, independent; what pairing sees.
        seed: of each evaluation as a whole (the luck of one training run), independent; what pairing cannot see.
        shared_seed: of each training seed, the same for all candidates; cancels between candidates of one seed.
    """

    offset: float = 0.6
    sequence: float = 0.005
    seed: float = 0.0
    shared_seed: float = 0.02


@dataclass(frozen=True, eq=False)
class ModelTables:
    """The parts of a model-like loss; all tables ``[num_groups, num_bits, num_ranks]``, nats per token.

    Attributes:
        error: from quantization, after the adapter's compensation.
        demand: of the task for rank: what a smaller adapter fails to learn.
    """

    error: Array
    demand: Array

    @property
    def total(self) -> Array:
        """Both together."""
        return self.error + self.demand


@dataclass(frozen=True, eq=False)
class ChainLandscape:
    """Truth of terms of single groups and of neighbouring groups, at every level.

    Choices of a group are counted over the flattened (bits, rank) table.

    Attributes:
        name: kind and seed.
        problem: with the proxy that methods see.
        level_costs: cheapest first, the last is 1.
        unary: loss of a group's choice at each level, nats per token, each ``[num_groups, num_choices]``.
        pairwise: of the choices of groups g and g + 1, each ``[num_groups - 1, num_choices, num_choices]``.
        noise: what evaluations add.
        seed: of the noise.
        pool: all candidates can be evaluated.
    """

    name: str
    problem: SearchProblem
    level_costs: tuple[float, ...]
    unary: tuple[Array, ...]
    pairwise: tuple[Array, ...]
    noise: Noise
    seed: int
    pool: None = None

    @property
    def num_seeds(self) -> int:
        """More than one where the luck of a training run matters."""
        return 3 if self.noise.seed else 1

    def resolve(self, candidate: Candidate, taken: Set[Candidate]) -> Candidate:
        """The candidate itself."""
        return candidate

    def level_loss(self, candidate: Candidate, level: int) -> float:
        """Without noise, nats per token."""
        positions = self.problem.space.as_array(candidate)
        choices = positions[:, 0] * len(self.problem.space.rank_choices) + positions[:, 1]
        groups = np.arange(len(choices))
        pairs = self.pairwise[level][groups[:-1], choices[:-1], choices[1:]]
        return BASE_LOSS + float(self.unary[level][groups, choices].sum() + pairs.sum())

    def true_loss(self, candidate: Candidate) -> float:
        """Without noise at the highest level, nats per token."""
        return self.level_loss(candidate, len(self.level_costs) - 1)

    def evaluate(self, candidate: Candidate, level: int, seed: int = 0) -> Evaluation:
        """The level's loss with the noise of this candidate, level and seed."""
        own = np.random.default_rng([self.seed, level, seed, zlib.crc32(repr(candidate).encode())])
        shared = np.random.default_rng([self.seed, level, seed])
        loss = self.level_loss(candidate, level)
        loss += self.noise.seed * own.normal() + self.noise.shared_seed * shared.normal()
        losses = loss + self._offsets + self.noise.sequence * own.normal(size=NUM_SEQUENCES)
        return Evaluation(float(losses.mean()), tuple(losses.tolist()))

    @cached_property
    def optimum(self) -> tuple[Candidate, float]:
        """The best candidate within the budget and its true loss, exact."""
        num_groups, num_ranks = self.problem.space.num_groups, len(self.problem.space.rank_choices)
        sizes = self.problem.bytes_table.reshape(num_groups, -1) // UNIT_BYTES
        capacity = (self.problem.budget_bytes - self.problem.fixed_bytes) // UNIT_BYTES
        choices, loss = chain_optimum(self.unary[-1], self.pairwise[-1], sizes, capacity)
        candidate = self.problem.space.from_array(np.column_stack(np.divmod(choices, num_ranks)))
        return candidate, BASE_LOSS + loss

    @property
    def optimum_loss(self) -> float:
        """Least true loss within the budget, nats per token."""
        return self.optimum[1]

    @cached_property
    def _offsets(self) -> Array:
        offsets = np.random.default_rng([self.seed, NUM_SEQUENCES]).normal(size=NUM_SEQUENCES)
        return np.asarray(self.noise.offset * (offsets - offsets.mean()))


def additive(seed: int, num_layers: int = 16, spread: float = 0.4) -> ChainLandscape:
    """Additive truth; the proxy is wrong by a factor per group, drawn log-normally with this spread."""
    rng = np.random.default_rng([1, seed])
    problem, proxy = _model_problem(rng, num_layers)
    factors = rng.lognormal(0, spread, len(proxy.error))
    truth = ModelTables(proxy.error * factors[:, None, None], proxy.demand * factors[:, None, None])
    return _single_level(f"additive-{seed}", problem, truth, np.zeros(len(factors) - 1), Noise(), seed)


def exact_proxy(seed: int, num_layers: int = 16) -> ChainLandscape:
    """The proxy is the truth, so that the exact allocation is the optimum."""
    return additive(seed, num_layers, spread=0.0)


def interactions(seed: int, num_layers: int = 16, noise: Noise | None = None) -> ChainLandscape:
    """Neighbouring groups strengthen or cancel each other; bit rungs and kinds of modules are mis-scored."""
    rng = np.random.default_rng([2, seed])
    problem, proxy = _model_problem(rng, num_layers)
    truth = _mis_scored(proxy, rng)
    coupling = _couplings(rng, problem)
    return _single_level(f"interactions-{seed}", problem, truth, coupling, noise or Noise(), seed)


def noisy(seed: int, num_layers: int = 16) -> ChainLandscape:
    """Interactions, seen through few noisy sequences and the luck of single training runs."""
    return interactions(seed, num_layers, Noise(sequence=0.15, seed=0.02))


def deceptive(seed: int, num_layers: int = 16) -> ChainLandscape:
    """The proxy prefers low bits with low rank where they are bad, and the way to high rank leads uphill.

    In two fifths of the groups low bits are far worse than the proxy says unless the rank is large, and then better;
    each smaller step of rank looks like a loss.
    """
    rng = np.random.default_rng([3, seed])
    problem, proxy = _model_problem(rng, num_layers)
    truth = _mis_scored(proxy, rng, rung_spread=0.15)
    trapped = rng.random(len(proxy.error)) < 0.4
    factors = np.ones((len(BIT_CHOICES), len(RANK_CHOICES)))
    factors[0] = 3.0, 3.6, 4.6, 0.8, 0.2
    factors[1] = 1.3, 1.6, 2.0, 0.8, 0.5
    error = np.where(trapped[:, None, None], truth.error * factors, truth.error)
    truth = ModelTables(error, truth.demand)
    return _single_level(f"deceptive-{seed}", problem, truth, _couplings(rng, problem), Noise(), seed)


def multi_fidelity(seed: int, num_layers: int = 16) -> ChainLandscape:
    """Interactions with two cheaper levels that distort.

    Before training low bits lose more than they will, and rank has nothing learned yet; halfway, half of that.
    """
    rng = np.random.default_rng([4, seed])
    problem, proxy = _model_problem(rng, num_layers)
    truth, coupling = _mis_scored(proxy, rng), _couplings(rng, problem)
    overstated = np.array([1.8, 1.3, 1.1, 1.0])[None, :, None] * rng.lognormal(0, 0.3, (len(proxy.error), 1, 1))
    other = _couplings(rng, problem)
    unary, pairwise = [], []
    for progress, offset in ((0.0, 0.3), (0.5, 0.12), (1.0, 0.0)):
        error = truth.error * overstated ** (1 - progress)
        demand = progress * truth.demand + (1 - progress) * truth.demand[:, :, :1]
        mixed = (coupling + (1 - progress) * other) / (2 - progress)
        level_unary = _flat(error + demand)
        level_unary[0] += offset
        unary.append(level_unary)
        pairwise.append(_coupled(error, mixed))
    costs = (0.05, 0.25, 1.0)
    name = f"multi-fidelity-{seed}"
    return ChainLandscape(name, problem, costs, tuple(unary), tuple(pairwise), Noise(sequence=0.02), seed)


LANDSCAPES: dict[str, Callable[[int], ChainLandscape]] = {
    "exact-proxy": exact_proxy,
    "additive": additive,
    "interactions": interactions,
    "deceptive": deceptive,
    "noisy": noisy,
    "multi-fidelity": multi_fidelity,
}


def _model_problem(rng: np.random.Generator, num_layers: int) -> tuple[SearchProblem, ModelTables]:
    """Two groups a layer; the budget lies between 2.5 and 3.5 bits, adapters included.

    The error falls fourfold a bit, an adapter takes part of it away, sensitivities are heavy-tailed, and the demand
    for rank falls off exponentially.
    """
    kinds = list(KIND_UNITS) * num_layers
    names = [f"model.layers.{index // len(KIND_UNITS)}.{kind}" for index, kind in enumerate(kinds)]
    groups = tuple(ModuleGroup(name, (f"{name}.linear",), max(RANK_CHOICES)) for name in names)
    bits, ranks = np.array(BIT_CHOICES), np.array(RANK_CHOICES)
    num_groups = len(groups)
    sensitivity = np.asarray(rng.lognormal(0.0, 1.2, num_groups) * 8.0 / num_groups)
    removable = rng.uniform(0.2, 0.7, num_groups)
    left = 1 - removable[:, None] * ranks / (ranks + 16.0)
    error = sensitivity[:, None, None] * 4.0 ** -(bits - 1.0)[None, :, None] * left[:, None, :]
    demand = rng.lognormal(-1.5, 1.0, num_groups)[:, None] / num_groups * np.exp(-ranks / 16.0)
    proxy = ModelTables(error, np.broadcast_to(demand[:, None, :], error.shape))
    per_bit, per_rank = np.array([KIND_UNITS[kind] for kind in kinds]).T
    units = per_bit[:, None, None] * bits[None, :, None] + (per_rank[:, None] * (ranks // 4))[:, None, :]
    budget_units = int(rng.uniform(2.5, 3.5) * per_bit.sum())
    space = SearchSpace(groups, BIT_CHOICES, RANK_CHOICES)
    sizes = np.ascontiguousarray(units * UNIT_BYTES, dtype=np.int64)
    budget = FIXED_BYTES + budget_units * UNIT_BYTES
    return SearchProblem(space, sizes, np.array(proxy.total), FIXED_BYTES, budget), proxy


def _mis_scored(proxy: ModelTables, rng: np.random.Generator, rung_spread: float = 0.5) -> ModelTables:
    """Errors wrong by log-normal factors of the group, of its kind, of 2 bits and, a third as much, of other rungs."""
    num_groups, num_bits, _ = proxy.error.shape
    group = rng.lognormal(0, 0.3, num_groups)
    kind = np.resize(rng.lognormal(0, 0.4, len(KIND_UNITS)), num_groups)
    spreads = np.where(np.arange(num_bits) == 0, rung_spread, rung_spread / 3)
    rung = np.exp(spreads * rng.normal(size=num_bits))
    error = proxy.error * (group * kind)[:, None, None] * np.minimum.accumulate(rung)[None, :, None]
    return ModelTables(error, proxy.demand * rng.lognormal(0, 0.4, (num_groups, 1, 1)))


def _couplings(rng: np.random.Generator, problem: SearchProblem) -> Array:
    """Correlations of neighbouring perturbations, both signs, ``[num_groups - 1]``.

    Below one half the quadratic form is positive definite: no combination of errors lowers the loss below the base.
    """
    return np.asarray(rng.uniform(-0.5, 0.5, problem.space.num_groups - 1))


def _coupled(error: Array, coupling: Array) -> Array:
    """Mixed terms ``2 rho_g sqrt(l_g l_(g+1))`` of a quadratic form in perturbations of squared size l."""
    roots = np.sqrt(_flat(error))
    return np.asarray(2 * coupling[:, None, None] * roots[:-1, :, None] * roots[1:, None, :])


def _flat(table: Array) -> Array:
    return np.array(table, dtype=np.float64).reshape(len(table), -1)


def _single_level(
    name: str, problem: SearchProblem, truth: ModelTables, coupling: Array, noise: Noise, seed: int
) -> ChainLandscape:
    pairwise = _coupled(truth.error, coupling)
    return ChainLandscape(name, problem, (1.0,), (_flat(truth.total),), (pairwise,), noise, seed)
