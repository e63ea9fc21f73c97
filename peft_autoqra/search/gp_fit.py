"""Fitting of small Gaussian processes that never fails and leaves the global generators alone."""

from __future__ import annotations

from botorch.exceptions.errors import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood

MAX_ITERATIONS = 200


def fit_hyperparameters(model: SingleTaskGP, seed: int) -> None:
    """Maximum a posteriori by L-BFGS, in place; the model is left in evaluation mode.

    Args:
        model: with priors on its hyperparameters, whose starting point stays where no fit succeeds.
        seed: of the hyperparameters that a failed attempt restarts from.
    """
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with manual_seed(seed):
        try:
            fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": MAX_ITERATIONS}})
        except ModelFittingError:
            model.load_state_dict(start)
    model.eval()
