"""Fitting of small Gaussian processes that never fails and leaves the global generators alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from botorch.exceptions.errors import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning

OPTIMIZER_OPTIONS = {"maxiter": 60, "ftol": 1e-6}  # nothing is won by the last digits of a lengthscale


@contextmanager
def one_thread() -> Iterator[None]:
    """Run small tensor operations on one thread, then restore PyTorch's setting.

    Their threads spend their time waiting for each other; on two cores with one of them busy, fits of 30 observations
    took four times as long with two threads.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def jitter_allowed() -> Iterator[None]:
    """Near-identical candidates give covariances that need a jitter of 1e-8 or so; nobody has to be warned of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        yield


@one_thread()
def fit_hyperparameters(model: SingleTaskGP, seed: int) -> None:
    """Maximum a posteriori by L-BFGS, in place; the model is left in evaluation mode.

    Args:
        model: with priors on its hyperparameters, whose starting point stays where no fit succeeds.
        seed: of the hyperparameters that a failed attempt restarts from.
    """
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with manual_seed(seed), jitter_allowed():
        try:
            fit_gpytorch_mll(mll, optimizer_kwargs={"options": OPTIMIZER_OPTIONS})
        except ModelFittingError:
            model.load_state_dict(start)
    model.eval()
