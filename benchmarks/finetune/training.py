"""One fine-tune from a prepared model to its record."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.decoded_base import decode_base
from benchmarks.finetune.environment import describe_environment
from benchmarks.finetune.memory_model import memory_model_of
from benchmarks.finetune.method import Method, NotApplicable, Prepared
from benchmarks.finetune.records import Memory, Record, Run
from benchmarks.finetune.scoring import score
from benchmarks.finetune.setting import Setting
from benchmarks.finetune.tensor_bytes import measured_bytes
from peft_autoqra.errors import SearchBudgetError
from peft_autoqra.evaluation.sft import quiet_arguments
from peft_autoqra.evaluation.trial_memory import is_out_of_memory, memory_freed
from peft_autoqra.evaluation.trial_trainer import TrialTrainer
from peft_autoqra.memory import MemoryBudget
from peft_autoqra.memory_estimate import MemoryEstimate


class PlainLossTrainer(TrialTrainer):
    """SFTTrainer with the model's own loss.

    The same figure as TRL's, without its entropy and token accuracy: on a CPU these take longer than the model.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' Trainer."""
        return Trainer.compute_loss(self, *args, **kwargs)


class TensorBytes(TrainerCallback):
    """Counts bytes at the first optimizer step, when gradients are there still and optimizer states already."""

    def __init__(self, model: torch.nn.Module, module_names: tuple[str, ...]) -> None:
        """Frozen weights are counted now, as the method made them."""
        self._model, self._names = model, module_names
        self._before = measured_bytes(model, module_names)
        self.measured: MemoryEstimate | None = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count."""
        if self.measured is None:
            now = measured_bytes(self._model, self._names, kwargs["optimizer"])
            before = self._before.to_dict()
            trained = {name: getattr(now, name) for name in ("gradient_bytes", "optimizer_bytes")}
            self.measured = MemoryEstimate(**before | trained)


@memory_freed()
def run_method(method: Method, run: Run, setting: Setting, *, decoded: bool) -> Record:
    """Prepare, train and score; what that took is free again at the end, for the runs that follow.

    Args:
        method: of the run.
        run: what is asked for.
        setting: its model, task and recipe.
        decoded: decode quantized weights once instead of at every pass, which changes no result; their bytes are
            counted before.

    Raises:
        RuntimeError: from a library, for another reason than a lack of memory.
    """  # noqa: DOC501 - lack of memory becomes a record
    with TemporaryDirectory() as directory:
        args = setting.recipe.sft_config(Path(directory), learning_rate=run.learning_rate, seed=run.seed)
        torch.manual_seed(run.seed)
        try:
            prepared = method.prepare(setting, run.budget, args)
            return _trained(prepared, run, setting, args, decoded=decoded)
        except (NotApplicable, SearchBudgetError) as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"out of memory on this device: {error}"
        return Record(run=run, status="not applicable", digest=setting.digest, reason=reason)


def _trained(prepared: Prepared, run: Run, setting: Setting, args: SFTConfig, *, decoded: bool) -> Record:
    data, test_rows = setting.data, setting.test_rows  # refused before anything is trained
    count = TensorBytes(prepared.model, prepared.module_names)
    if decoded:
        decode_base(prepared.model)
    common = {
        "run": run,
        "digest": setting.digest,
        "mean_bits": round(prepared.mean_bits, 4),
        "mean_rank": round(prepared.mean_rank, 4),
        "spent": prepared.spent,
        "environment": describe_environment(),
    }
    trainer = PlainLossTrainer(
        model=prepared.model,
        args=quiet_arguments(args, str(args.output_dir)),
        train_dataset=data.train,
        processing_class=data.processing_class,
        callbacks=[*prepared.callbacks, count],  # AdaLoRA makes tensors of its own in a callback
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    device = args.device
    if device.type != "cpu":
        gc.collect()  # the model that data was prepared with, and those of a search
        torch.accelerator.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        trainer.train()
        seconds = time.perf_counter() - start
        peak = torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else None
        with torch.autocast(device.type, torch.bfloat16):
            dev = score(prepared.model, setting, data.held_out, setting.task.dev)
            test = score(prepared.model, setting, test_rows, setting.task.test)
    except ArithmeticError as error:
        return Record(**common, status="diverged", reason=str(error))
    limit = limit_of(run.budget, memory_model_of(setting, args)) if run.budget else None
    return Record(
        **common,
        status="completed",
        dev=dev,
        test=test,
        memory=_memory(prepared, count, limit, peak),
        train_seconds=round(seconds, 2),
        num_steps=int(trainer.state.global_step),
    )


def _memory(prepared: Prepared, count: TensorBytes, limit: MemoryBudget | None, peak: int | None) -> Memory:
    assert count.measured is not None  # every run takes a step
    memory = Memory(predicted=prepared.predicted, measured=count.measured, peak_bytes=peak)
    return replace(memory, budget_bytes=limit.limit_bytes, scope=limit.scope) if limit else memory
