"""An SFTTrainer whose files do not depend on how many processes wrote them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import SFTTrainer

from peft_autoqra.replaced_file import replaced_contents
from peft_autoqra.sharding import (
    load_whole_adapter,
    load_whole_optimizer_state,
    prepare_for_sharding,
    whole_optimizer_state,
    whole_trained_tensors,
)


class PortableTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains adapters on quantized layers, in one process or in several that share the model by DDP or FSDP2.

    Under FSDP2 transformers saves checkpoints in a form of their own, which FSDP alone can read, and gathers the base
    model for each. This trainer writes what one process would: the adapter, and ``optimizer.pt``. So a checkpoint of
    any number of processes goes on in any other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As SFTTrainer."""
        super().__init__(*args, **kwargs)
        prepare_for_sharding(self.model, self.accelerator)

    @property
    def is_sharded(self) -> bool:
        """Whether the model is shared by FSDP2."""
        return bool(self.accelerator.is_fsdp2)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing where the checkpoint is of the last step already: transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; every process must call this, the first one writes.

        Files that are there are replaced only when all the new ones are written.

        Raises:
            StorageError: the disk does not take it.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        with replaced_contents(folder) if self.args.should_save else nullcontext(folder) as new:
            self._write_model(str(new), _internal_call)

    def _write_model(self, output_dir: str, _internal_call: bool) -> None:
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        tensors = whole_trained_tensors(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=tensors)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tensors = load_file(Path(resume_from_checkpoint, SAFETENSORS_WEIGHTS_NAME))
        load_whole_adapter(self.model if model is None else model, tensors)

    def _load_best_model(self) -> None:
        if not self.is_sharded:
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_whole_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)
