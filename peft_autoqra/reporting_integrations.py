"""transformers' reporting integrations, to be driven without a Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.recipe import RecipeError


@dataclass
class ReportingIntegration:
    """One entry of ``report_to``.

    Attributes:
        name: as in ``report_to``.
        callback: transformers' integration.
        num_trials: that it was told of, those before an interruption included.
        has_summary: it was told the result.
        has_failed: it is told nothing more.
    """

    name: str
    callback: TrainerCallback
    num_trials: int = 0
    has_summary: bool = False
    has_failed: bool = False


def make_integrations(report_to: str | Sequence[str] | None) -> list[ReportingIntegration]:
    """The integrations of a recipe's ``report_to``; all of them have to be installed.

    Raises:
        MissingDependencyError: one is not installed.
        RecipeError: one that transformers does not know.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [ReportingIntegration(name, _callback(name)) for name in dict.fromkeys(names) if name != "none"]


def _callback(name: str) -> TrainerCallback:
    try:
        (callback,) = get_reporting_integration_callbacks([name])
    except ValueError as error:
        raise RecipeError(f"report_to={name!r}: {error}") from error
    try:
        with environment(WANDB_LOG_MODEL="false"):  # it would upload the unquantized model
            return callback()
    except (ImportError, RuntimeError) as error:
        package = name.replace("_", "-")
        raise MissingDependencyError(f"report_to={name!r} needs `pip install {package}` ({error})") from error


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
