"""Letting accelerate shard a model over CPU processes, which it does over GPUs only."""

from __future__ import annotations

import os
from unittest.mock import patch

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import distributed


def forget_accelerate_state() -> None:
    """Let the next trainer find out anew how it was started; the process group stays."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def sharding_on_cpus() -> patch:
    """While it lasts these processes pass for ones with a GPU each; all else that happens is accelerate's and torch's.

    ``AcceleratorState`` turns FSDP on for GPUs, and knows them by what this method returns.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
