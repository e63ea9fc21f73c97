"""How the processes of a fine-tune share it, and what of that cannot work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from accelerate.state import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import TrainingArguments

from peft_autoqra.errors import AutoQRAError

Value = TypeVar("Value")
Strategy = Literal["single", "ddp", "fsdp2"]


class DistributionError(AutoQRAError, ValueError):
    """Processes that cannot train together as they were started."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The processes of one fine-tune.

    Attributes:
        strategy: ``"ddp"``: each holds the whole model; ``"fsdp2"``: each holds a part of every layer.
        num_processes: on all machines.
        process_index: of this one; 0 writes and prints.
        first_process_reads: the others get their parts of the base model from the first one, and hold no weights
            before.
    """

    strategy: Strategy = "single"
    num_processes: int = 1
    process_index: int = 0
    first_process_reads: bool = False

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes and prints."""
        return self.process_index == 0

    def shared(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, in all processes; an error of its becomes an error of all.

        Args:
            make: called in the first process; its value is pickled for the others.

        Raises:
            AutoQRAError: as ``make`` does.
            DistributionError: ``make`` failed otherwise, in a process other than this one.
        """
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main_process:
            try:
                outcome[0] = make()
            except Exception as error:
                failure = error
                outcome[1] = error if isinstance(error, AutoQRAError) else _described(error)
        if self.num_processes > 1:
            broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise outcome[1]
        value: Value = outcome[0]
        return value

    def by_main_process(self, make: Callable[[], Value]) -> Value | None:
        """What the first process makes, None in the others; an error of its becomes an error of all.

        Raises:
            AutoQRAError: as ``make`` does.
            DistributionError: ``make`` failed otherwise, in a process other than this one.
        """
        made: list[Value] = []
        self.shared(lambda: made.append(make()))
        return made[0] if made else None


def find_distribution(args: TrainingArguments) -> Distribution:
    """How this process was started; the launcher's environment and the recipe's ``fsdp`` decide.

    Raises:
        DistributionError: processes that do not know of each other, several GPUs in one process, FSDP1, or FSDP
            without GPUs.
    """
    num_processes = int(args.world_size)
    if int(os.environ.get("WORLD_SIZE", "1")) > num_processes:
        raise DistributionError(
            f"The launcher started {os.environ['WORLD_SIZE']} processes, but accelerate finds no device that they "
            "could train together on. On CPUs set use_cpu: true in the recipe."
        )
    if args.n_gpu > 1:
        raise DistributionError(
            f"One process sees {args.n_gpu} GPUs, on which transformers would train with DataParallel; it cannot copy "
            "quantized layers. Start one process a GPU, `accelerate launch --config_file examples/accelerate/ddp.yaml "
            "scripts/finetune.py ...`, or show one GPU only, CUDA_VISIBLE_DEVICES=0."
        )
    place = {"num_processes": num_processes, "process_index": int(args.process_index)}
    if not _asks_for_fsdp(args):
        return Distribution(strategy="ddp" if num_processes > 1 else "single", **place)  # type: ignore[arg-type]
    _check_fsdp(args)
    reads_once = num_processes > 1 and _first_process_reads(args)
    return Distribution(strategy="fsdp2", first_process_reads=reads_once, **place)


def every_process_reads(distribution: Distribution, args: TrainingArguments) -> Distribution:
    """The same, with a base model that each process reads by itself; tells transformers and accelerate so."""
    if not distribution.first_process_reads:
        return distribution
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if args.fsdp_plugin_args is not None:
        args.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
    return replace(distribution, first_process_reads=False)


def _described(error: Exception) -> DistributionError:
    return DistributionError(f"The first process failed: {type(error).__name__}: {error}")


def _asks_for_fsdp(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or _is_true("ACCELERATE_USE_FSDP")


def _check_fsdp(args: TrainingArguments) -> None:
    plugin_args = args.fsdp_plugin_args or {"fsdp_version": os.environ.get("FSDP_VERSION", "1")}
    if int(plugin_args["fsdp_version"]) != 2:
        raise DistributionError(
            "FSDP1 joins the parameters of a layer to one trainable tensor, and quantized weights are integers. Use "
            "FSDP2: fsdp_version: 2, as in examples/accelerate/fsdp2.yaml."
        )
    if PartialState().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise DistributionError(
            "accelerate shards a model over GPUs (FSDP) and not over CPUs: every process would hold all of it. Use "
            "DDP, as in examples/accelerate/cpu_two_processes.yaml."
        )


def _first_process_reads(args: TrainingArguments) -> bool:
    if args.fsdp_plugin_args is not None:
        return bool(args.fsdp_plugin_args["cpu_ram_efficient_loading"])
    return _is_true("FSDP_CPU_RAM_EFFICIENT_LOADING")


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
