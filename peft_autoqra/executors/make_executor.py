"""From the settings to the executor that they name."""

from __future__ import annotations

from peft_autoqra.executors.arguments import ExecutorArguments
from peft_autoqra.executors.executor import TrialExecutor
from peft_autoqra.executors.in_process import InProcessExecutor
from peft_autoqra.executors.ray_executor import RayExecutor


def make_executor(args: ExecutorArguments) -> TrialExecutor:
    """What the arguments name.

    Raises:
        MissingDependencyError: Ray is not installed.
        ExecutorError: no cluster at the address, or a number below its least.
    """
    if args.executor == "in_process":
        return InProcessExecutor()
    return RayExecutor(
        address=args.ray_address,
        num_workers=args.num_workers,
        cpus_per_worker=1 if args.cpus_per_worker is None else args.cpus_per_worker,
        gpus_per_worker=args.gpus_per_worker,
    )
