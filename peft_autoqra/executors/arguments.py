"""Where trials are evaluated, as a recipe and the command line say it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft_autoqra.recipe import RecipeError

_OF_WORKERS = ("ray_address", "num_workers", "cpus_per_worker", "gpus_per_worker")


@dataclass(frozen=True, kw_only=True)
class ExecutorArguments:
    """Who evaluates the trials of a search; nothing of it decides which search it is.

    Attributes:
        executor: ``"in_process"``, one trial after the other; or ``"ray"``, in actors of a cluster.
        ray_address: of a running cluster, such as ``"auto"``; None starts one on this machine.
        num_workers: actors at most; None for as many as the cluster has room for, also later.
        cpus_per_worker: CPUs and threads of each; 1 where it is None.
        gpus_per_worker: GPUs of each; less than 1 to share one. None takes 1 where the search computes on a GPU.
        deterministic: propose trials as if a fixed number were under way, whatever the number of workers, so that
            neither it nor the order of arrival changes what is found.

    Raises:
        RecipeError: an executor that is none of these, or settings of workers without workers.
    """

    executor: Literal["in_process", "ray"] = field(
        default="in_process", metadata={"help": "Where trials run: in_process, or ray for workers in a cluster."}
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Of a running cluster, such as auto; by default one is started here."}
    )
    num_workers: int | None = field(
        default=None, metadata={"help": "Number of workers at most; by default as many as the cluster has room for."}
    )
    cpus_per_worker: int | None = field(
        default=None, metadata={"help": "Number of CPUs, and of threads, of a worker; 1 by default."}
    )
    gpus_per_worker: float | None = field(
        default=None, metadata={"help": "Number of GPUs of a worker, such as 0.5; by default 1 where there are any."}
    )
    deterministic: bool = field(
        default=False, metadata={"help": "Same trials with any number of workers; more than 8 do not help."}
    )

    def __post_init__(self) -> None:
        """Workers need a cluster."""
        if self.executor not in ("in_process", "ray"):
            raise RecipeError(f"executor={self.executor!r} must be in_process or ray.")
        given = [name for name in _OF_WORKERS if getattr(self, name) is not None]
        if self.executor == "in_process" and given:
            raise RecipeError(f"{', '.join(given)}: one process has no workers; set executor to ray.")
