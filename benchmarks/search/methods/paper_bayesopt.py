"""AutoQRA's stage 2: expected improvement over the atomic edits of the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.priors import GammaPrior

from benchmarks.search.methods.paper_surrogate import coverages
from benchmarks.search.run import Run
from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search.gp_fit import fit_hyperparameters
from peft_autoqra.search.pareto import ParetoPoint, nondominated
from peft_autoqra.search_space import Candidate

MIN_EXPECTED_IMPROVEMENT = 1e-4  # Eq. 13, nats per token


def improve_front(run: Run, losses: dict[Candidate, float], priors: ImportancePriors, seed: int) -> None:
    """Evaluate the best edit of the front until the cost is spent or no edit promises an improvement.

    The objective is the loss alone (alpha = 1 in Eq. 8): all candidates are within the budget, and what they leave of
    it is worth nothing here. Where only a pool can be evaluated, its members take the place of the edits.

    Args:
        run: evaluates at the highest level.
        losses: what is known at the highest level, nats per token; at least two. Grows.
        priors: weights of the coverages.
        seed: of the restarts of a fit that fails.
    """
    while True:
        proposals = _neighbourhood(run, losses)
        if not proposals:
            return
        known = list(losses)
        targets = torch.tensor([[-losses[candidate]] for candidate in known], dtype=torch.float64)
        model = _fitted(_embedded(run, priors, known), targets, seed + len(known))
        acquisition = LogExpectedImprovement(model, best_f=targets.max())  # the same maximum, without underflow
        with torch.no_grad():
            values = acquisition(_embedded(run, priors, proposals)[:, None]).exp()
        if values.max() < MIN_EXPECTED_IMPROVEMENT:
            return
        resolved, evaluation = run.evaluate(proposals[int(values.argmax())])
        losses[resolved] = evaluation.loss


def _neighbourhood(run: Run, losses: dict[Candidate, float]) -> list[Candidate]:
    """Edits of the front within the budget that were not evaluated (Eq. 11)."""
    if run.environment.pool is not None:
        return [candidate for candidate in run.environment.pool if candidate not in losses]
    points = (ParetoPoint(c, loss, run.problem.total_bytes(c)) for c, loss in losses.items())
    edits = (edit for point in nondominated(points) for edit in run.problem.space.neighbors(point.candidate))
    return list(dict.fromkeys(edit for edit in edits if edit not in losses and run.problem.is_feasible(edit)))


def _embedded(run: Run, priors: ImportancePriors, candidates: Sequence[Candidate]) -> torch.Tensor:
    """Eq. 9: ladder positions scaled to [0, 1], then the coverages; ``[num_candidates, 2 * num_groups + 2]``."""
    positions = np.asarray(candidates, dtype=np.int64)
    scaled = positions / np.maximum(run.problem.space.num_rungs - 1, 1)
    columns = [scaled.reshape(len(candidates), -1), coverages(run.problem, priors, positions)]
    return torch.from_numpy(np.concatenate(columns, axis=1))


def _fitted(inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> SingleTaskGP:
    """Matern-5/2 with one lengthscale (the paper names only the kernel)."""
    kernel = ScaleKernel(
        MaternKernel(nu=2.5, lengthscale_prior=GammaPrior(3.0, 6.0)), outputscale_prior=GammaPrior(2.0, 0.15)
    )
    model = SingleTaskGP(inputs, targets, covar_module=kernel, outcome_transform=Standardize(1))
    fit_hyperparameters(model, seed)
    return model
