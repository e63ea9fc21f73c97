"""What a trial used is free again at its end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import release_memory

_MESSAGES = ("out of memory", "can't allocate memory")  # of devices' libraries, and of torch's allocator for the CPU


@contextmanager
def memory_freed() -> Iterator[None]:
    """Collect the garbage of a block and give the device's cache back, whatever ends the block.

    Trainers and models refer to themselves, so that only a collection frees them; so does an exception to the frames
    it passed, which is why it must be gone by then: use this as the decorator of a function that handles it inside.
    What was there before the block is not gone through, which would take longer than a training step of a small model.
    """
    freezes = gc.get_freeze_count() == 0  # else it is the caller's, who may not want it thawed
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        release_memory()
        if freezes:
            gc.unfreeze()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine had no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
