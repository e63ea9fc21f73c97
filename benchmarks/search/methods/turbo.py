"""TuRBO-1 (Eriksson et al. 2019, arXiv 1910.01739) on BoTorch, over the ladders relaxed to the unit cube."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from botorch.generation import MaxPosteriorSampling
from botorch.models import SingleTaskGP
from botorch.utils.sampling import draw_sobol_samples, manual_seed
from gpytorch.constraints import Interval
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from benchmarks.search.run import Run, until_spent
from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.importance.repair import repair
from peft_autoqra.search.gp_fit import fit_hyperparameters, one_thread
from peft_autoqra.search_space import Candidate, SearchSpace

NUM_INITIAL = 10
NUM_CANDIDATES = 1000  # Thompson samples are drawn jointly, so their time grows with its cube
NUM_PERTURBED = 20.0  # coordinates of a candidate that leave the centre, on average
LENGTH, MIN_LENGTH, MAX_LENGTH = 0.8, 0.5**7, 1.6
SUCCESS_TOLERANCE, MIN_FAILURE_TOLERANCE = 3, 4


@dataclass
class Region:
    """One trust region and all that was evaluated in it.

    Attributes:
        points: in the unit cube, each ``[d]``.
        losses: nats per token.
        length: side of the region before it is shaped by the lengthscales, of 1.
        successes: evaluations in a row that improved.
        failures: evaluations in a row that did not.
    """

    points: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    length: float = LENGTH
    successes: int = 0
    failures: int = 0

    def add(self, point: Tensor, loss: float) -> None:
        """Add an evaluation; after the initial ones the length grows and shrinks by them."""
        if len(self.losses) >= NUM_INITIAL:
            best = min(self.losses)
            success = loss < best - 1e-3 * abs(best)
            self.successes, self.failures = (self.successes + 1, 0) if success else (0, self.failures + 1)
            if self.successes == SUCCESS_TOLERANCE:
                self.length, self.successes = min(2 * self.length, MAX_LENGTH), 0
            elif self.failures >= max(MIN_FAILURE_TOLERANCE, len(point)):
                self.length, self.failures = self.length / 2, 0
        self.points.append(point)
        self.losses.append(loss)


@until_spent
def turbo(run: Run, seed: int) -> None:
    """Sobol start, then one Thompson sample at a time; a region that collapsed is followed by a fresh one.

    Points are rounded to the ladders and repaired, and the Gaussian process learns the points that were evaluated.
    Where only a pool can be evaluated, Thompson sampling chooses among its members within the region, or among all
    where none lies there.
    """
    with manual_seed(seed), one_thread():
        for restart in range(10**6):
            region = Region()
            bounds = torch.tensor([[0.0], [1.0]]).repeat(1, 2 * run.problem.space.num_groups).double()
            start = draw_sobol_samples(bounds, NUM_INITIAL, 1, seed=1000 * seed + restart)[:, 0]
            for point in start:
                _evaluate(run, region, point)
            while region.length >= MIN_LENGTH:
                _evaluate(run, region, _next_point(run, region, seed))


def _evaluate(run: Run, region: Region, point: Tensor) -> None:
    space = run.problem.space
    proposal = repair(run.problem, rounded(space, point), ImportancePriors.from_problem(run.problem))
    resolved, evaluation = run.evaluate(proposal)
    region.add(cube_points(space, [resolved])[0], evaluation.loss)


def rounded(space: SearchSpace, point: Tensor) -> Candidate:
    """The ladder positions whose cells hold a point of the unit cube, ``[2 * num_groups]``."""
    rungs = space.num_rungs
    positions = (point.numpy().reshape(rungs.shape) * rungs).astype(np.int64)
    return space.from_array(np.minimum(positions, rungs - 1))


def cube_points(space: SearchSpace, candidates: Sequence[Candidate]) -> Tensor:
    """Centres of the candidates' cells, ``[num_candidates, 2 * num_groups]``; undoes :func:`rounded`."""
    positions = np.asarray(candidates, dtype=np.float64)
    return torch.from_numpy(((positions + 0.5) / space.num_rungs).reshape(len(candidates), -1))


def _next_point(run: Run, region: Region, seed: int) -> Tensor:
    inputs, losses = torch.stack(region.points), torch.tensor(region.losses, dtype=torch.float64)
    model = _fitted(inputs, -(losses - losses.mean()) / losses.std().clamp_min(1e-9), seed + len(losses))
    scales = model.covar_module.base_kernel.lengthscale.detach()[0]
    weights = scales / torch.exp(scales.log().mean())  # the product of the sides stays length ** d
    centre = inputs[losses.argmin()]
    lower = (centre - weights * region.length / 2).clamp(0, 1)
    upper = (centre + weights * region.length / 2).clamp(0, 1)
    candidates = _perturbed(centre, lower, upper)
    if run.environment.pool is not None:
        candidates = _pool_candidates(run, lower, upper)
    with torch.no_grad():
        sample: Tensor = MaxPosteriorSampling(model, replacement=False)(candidates, num_samples=1)[0]
    return sample


def _perturbed(centre: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Scrambled Sobol points of the region, most coordinates set to the centre's, ``[NUM_CANDIDATES, d]``."""
    samples = draw_sobol_samples(torch.stack([lower, upper]), NUM_CANDIDATES, 1, seed=_draw_seed())[:, 0]
    mask = torch.rand(samples.shape) <= min(1.0, NUM_PERTURBED / len(centre))
    untouched = ~mask.any(dim=1)
    mask[untouched, torch.randint(len(centre), (int(untouched.sum()),))] = True
    return torch.where(mask, samples, centre)


def _draw_seed() -> int:
    return int(torch.randint(2**31, (1,)))


def _pool_candidates(run: Run, lower: Tensor, upper: Tensor) -> Tensor:
    taken = {record.candidate for record in run.records}
    fresh = [candidate for candidate in run.environment.pool or () if candidate not in taken]
    points = cube_points(run.problem.space, fresh or list(taken))
    inside = ((points >= lower) & (points <= upper)).all(dim=1)
    return points[inside] if inside.any() else points


def _fitted(inputs: Tensor, targets: Tensor, seed: int) -> SingleTaskGP:
    """Matern-5/2 with a lengthscale per coordinate, bounded as in the paper."""
    kernel = MaternKernel(nu=2.5, ard_num_dims=inputs.shape[1], lengthscale_constraint=Interval(0.005, 4.0))
    likelihood = GaussianLikelihood(noise_constraint=Interval(1e-8, 1e-3))
    scaled = ScaleKernel(kernel, outputscale_constraint=Interval(0.05, 20.0))
    model = SingleTaskGP(inputs, targets[:, None], likelihood=likelihood, covar_module=scaled, outcome_transform=None)
    model.covar_module.base_kernel.lengthscale = min(4.0 - 1e-3, 0.5 * math.sqrt(inputs.shape[1] / 8.0))
    fit_hyperparameters(model, seed)
    return model
