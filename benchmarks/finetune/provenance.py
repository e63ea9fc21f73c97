"""What was run where, as sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.finetune.config import Config
from benchmarks.finetune.figures import seeds_of
from benchmarks.finetune.grid import LEAST_SWEPT
from benchmarks.finetune.results import Results


def describe_setting(config: Config) -> str:
    """Model, recipe and learning rates."""
    recipe, sizes = config.recipe, config.sizes
    rates = ", ".join(f"{rate:g}" for rate in sorted(config.learning_rates))
    further = ", and others beyond while the best is at the edge," if len(config.learning_rates) >= LEAST_SWEPT else ""
    tuned = f"the best of the learning rates {rates}{further} by {sizes.dev} other examples"
    return (
        f"{config.model.rpartition('/')[2]}, {recipe.max_steps} steps of {recipe.batch_size} sequences of at most "
        f"{recipe.max_length} tokens, from {sizes.train} examples a task; every method at "
        f"{tuned if len(config.learning_rates) > 1 else f'learning rate {rates}'}, and judged by {sizes.test} that "
        "nothing was chosen by."
    )


def describe_runs(results: Results) -> str:
    """How many, where, with which versions."""
    records = [record for record in results.records if record.environment]
    found = [record.environment for record in records]
    devices = sorted({str(environment["device"]) for environment in found})
    dates = sorted({str(environment["date"]) for environment in found})
    commits = list(dict.fromkeys(str(environment["commit"]) for environment in found if environment["commit"]))
    threads = seeds_of(environment["threads"] for environment in found)
    return (
        f"{len(records)} runs, {_seeds(results)} a cell; {' and '.join(devices)}, "
        f"{threads} thread{'' if threads == '1' else 's'} a run; {_versions(found)}; "
        f"{_range(dates)}; commit {_range(commits)}."
    )


def _seeds(results: Results) -> str:
    counts = seeds_of(len(runs.runs) for runs in results.cells.values() if runs.runs)
    return f"{counts} seed{'' if counts == '1' else 's'}"


def _versions(environments: Iterable[dict[str, Any]]) -> str:
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        for name, version in {"Python": environment["python"], **environment["versions"]}.items():
            found.setdefault(name, {})[str(version)] = None
    return ", ".join(f"{name} {'/'.join(versions)}" for name, versions in found.items())


def _range(values: list[str]) -> str:
    return " to ".join(dict.fromkeys((values[0], values[-1]))) if values else "unknown"
