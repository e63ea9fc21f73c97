"""A fine-tune with a plan, or with the same bits and rank everywhere, through TRL's SFTTrainer."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import PREFIX_CHECKPOINT_DIR
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig

from peft_autoqra.checkpoints import (
    check_checkpoint,
    checkpoint_plan,
    find_checkpoint,
    forget_contents,
    note_contents,
)
from peft_autoqra.distribution import Distribution, Strategy, find_distribution
from peft_autoqra.errors import AutoQRAError, PlanMismatchError
from peft_autoqra.evaluation.sft import SFTData
from peft_autoqra.evaluation.trial_memory import is_out_of_memory
from peft_autoqra.importance.calibrated_plan import calibrate_plan
from peft_autoqra.memory import OPTIMIZERS, MemoryModel
from peft_autoqra.memory_callback import MemoryBudgetCallback
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, QuantizerSettings
from peft_autoqra.portable_trainer import PortableTrainer
from peft_autoqra.readme import README
from peft_autoqra.recipe import AdapterArguments
from peft_autoqra.replaced_file import replaced_file, stored
from peft_autoqra.streaming.empty_layers import empty_dense_model
from peft_autoqra.streaming.hf_quantizer import empty_base, note_base
from peft_autoqra.streaming.quant_config import METHOD
from peft_autoqra.tuner.adapter_card import FineTuneFigures
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.preparation import quantize_base
from peft_autoqra.uniform_plan import uniform_plan

_TRL_USAGE = re.compile(r"^## Quick start\n.*?(?=^## )", re.DOTALL | re.MULTILINE)
RESULT_FILE = "finetune_result.json"
DEFAULT_BITS, DEFAULT_RANK = 4, 16


class TrainingDivergedError(AutoQRAError, ArithmeticError):
    """A fine-tune whose loss is not finite at the end."""


class TrainingMemoryError(AutoQRAError, MemoryError):
    """A fine-tune for which the device or the machine has too little memory."""


@dataclass(frozen=True, kw_only=True)
class FineTuneInputs:
    """What is trained on what.

    Attributes:
        model: unquantized, and quantized in place; or quantized by ``plan`` while it was read. None in the processes
            that get theirs from the first one, see :attr:`Distribution.first_process_reads`.
        processing_class: the tokenizer.
        train_dataset: in any format that SFTTrainer takes.
        eval_dataset: likewise.
        args: the recipe.
        adapter: bits and ranks.
        plan: what ``adapter.plan`` names, where it was read already.
    """

    model: PreTrainedModel | None
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Dataset
    args: SFTConfig
    adapter: AdapterArguments
    plan: BitRankPlan | None = None


@dataclass(frozen=True, kw_only=True)
class FineTuneEstimate:
    """What a fine-tune will take.

    Attributes:
        num_steps: optimizer steps.
        seconds: of these steps, from one timed forward and backward pass; evaluation is not counted.
    """

    num_steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FineTuneResult:
    """Outcome of a fine-tune.

    Attributes:
        eval_loss: on the held-out data after training, as the trainer computes it.
        train_loss: mean over the steps since it was started or went on; None where none was left.
        num_steps: optimizer steps that were taken.
        train_seconds: of the training loop, since then.
        estimated: bytes by part as foretold; None where the optimizer's states are not known.
        measured: bytes of the real tensors at the first optimizer step, in the process that held most; None where no
            step was taken.
        output_dir: where the adapter lies.
        num_processes: that trained together.
        strategy: how; with ``"fsdp2"`` each process holds, and ``measured`` counts, a part of the model.
    """

    eval_loss: float
    train_loss: float | None
    num_steps: int
    train_seconds: float
    estimated: MemoryEstimate | None
    measured: MemoryEstimate | None
    output_dir: str
    num_processes: int = 1
    strategy: Strategy = "single"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        memory = {"estimated": self.estimated, "measured": self.measured}
        return {
            **{key: value for key, value in vars(self).items() if key not in memory},
            **{key: value.to_dict() if value else None for key, value in memory.items()},
        }


class FineTune:
    """Quantizes a model, puts adapters on it and trains them; one process or many under ``accelerate launch``.

    Args:
        inputs: model, data and settings. Everything is checked and quantized here.

    Raises:
        DistributionError: the processes cannot train together as they were started.
        InvalidPlanError: bits, ranks or modules that do not fit the model, or a plan that is not one.
        CalibrationError: no data is left after tokenization.
        PlanMismatchError: the plan is for another model, or not the one of the checkpoint to resume from.
        RecipeError: there is no whole checkpoint to resume from.
    """

    def __init__(self, inputs: FineTuneInputs) -> None:
        """Quantize, add adapters and prepare the data."""
        args = inputs.args
        self.distribution = find_distribution(args)
        self.checkpoint = self.distribution.shared(lambda: find_checkpoint(args))
        # before the data: a wrong name fails at once
        plan = self.distribution.shared(lambda: _named_plan(inputs, self.checkpoint))
        model = _own_model(inputs, self.distribution)
        with _taken_for_unquantized(model):
            data = SFTData(
                model,
                args,
                inputs.train_dataset,
                inputs.eval_dataset,
                inputs.processing_class,
                allow_packing=True,
            )
        if plan is None:
            plan = self.distribution.shared(lambda: _uniform_plan(model, inputs.adapter, data, self.checkpoint))
        self.estimated = _estimate_memory(model, plan, args)
        if self.distribution.first_process_reads:
            plan = _share_base(model, plan, self.distribution)
        self.plan: BitRankPlan = plan
        config = AutoQRAConfig(
            plan=plan,
            lora_alpha=inputs.adapter.lora_alpha,
            lora_dropout=inputs.adapter.lora_dropout,
            task_type="CAUSAL_LM",
        )
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self.trainer = _CardTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=data.processing_class,
            peft_config=config,
        )
        self._memory = MemoryBudgetCallback(self.trainer)
        self.trainer.add_callback(self._memory)

    def estimate(self) -> FineTuneEstimate:
        """Time one forward and backward pass; no weight changes."""
        trainer, args = self.trainer, self.trainer.args
        loader = trainer.get_train_dataloader()
        steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        batch = next(iter(loader))
        seconds = 0.0
        for _ in range(2):  # the first pass warms up
            start = time.perf_counter()
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            seconds = time.perf_counter() - start
        trainer.model.zero_grad()
        return FineTuneEstimate(num_steps=num_steps, seconds=seconds * args.gradient_accumulation_steps * num_steps)

    def run(self) -> FineTuneResult:
        """Train, evaluate and save; in a run of many processes the first one writes.

        Raises:
            TrainingDivergedError: the loss is not finite; nothing is saved.
            TrainingMemoryError: there is too little memory; checkpoints are kept.
            StorageError: the disk is full; an adapter that was there is kept.
        """
        trainer, args = self.trainer, self.trainer.args
        start = time.perf_counter()
        with _memory_named(args):
            output = trainer.train(resume_from_checkpoint=self.checkpoint)
        train_seconds = time.perf_counter() - start
        result = FineTuneResult(
            eval_loss=float(trainer.evaluate()["eval_loss"]),
            train_loss=self._train_loss(output),
            num_steps=int(output.global_step),
            train_seconds=train_seconds,
            estimated=self.estimated,
            measured=self._measured(),
            output_dir=str(args.output_dir),
            num_processes=self.distribution.num_processes,
            strategy=self.distribution.strategy,
        )
        if not (math.isfinite(result.eval_loss) and math.isfinite(result.train_loss or 0.0)):
            raise TrainingDivergedError(
                f"The held-out loss is {result.eval_loss} after {result.num_steps} steps (while training: "
                f"{result.train_loss}), so the adapter is not saved. Lower learning_rate={args.learning_rate}, or "
                "train in bf16 or float32."
            )
        with stored(Path(args.output_dir)):
            self._save(result)
        return result

    def _save(self, result: FineTuneResult) -> None:
        trainer, args = self.trainer, self.trainer.args
        trainer.save_model(args.output_dir)
        trainer.finetune_figures = FineTuneFigures(
            held_out_loss=result.eval_loss,
            num_steps=result.num_steps,
            seconds=result.train_seconds,
            estimated=result.estimated,
            measured=None if self.trainer.is_sharded else result.measured,  # a part is not what a card is about
        )
        if self.is_main_process:
            trainer.update_model_card()
            with replaced_file(Path(args.output_dir, RESULT_FILE)) as partial:
                partial.write_text(json.dumps(result.to_dict(), indent=2), encoding="utf-8")

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes and prints."""
        return bool(self.trainer.is_world_process_zero())

    def _train_loss(self, output: TrainOutput) -> float | None:
        losses = gather_object([float(output.training_loss)])  # the trainer's is this process's
        took_a_step = self._memory.measured is not None
        return statistics.fmean(losses) if took_a_step else None

    def _measured(self) -> MemoryEstimate | None:
        measured: list[MemoryEstimate | None] = gather_object([self._memory.measured])
        known = [memory for memory in measured if memory is not None]
        return max(known, key=lambda memory: memory.total_bytes) if known else None


class _CardTrainer(PortableTrainer):
    """Adds the plan and the figures to the model card, which SFTTrainer writes anew with every checkpoint and push."""

    finetune_figures: FineTuneFigures | None = None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with stored(checkpoint):
            if self.args.should_save:
                forget_contents(checkpoint)
            super()._save_checkpoint(*args, **kwargs)
            if self.args.should_save:
                note_contents(checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            _correct_card(Path(self.args.output_dir, README))
            self.update_model_card()

    def update_model_card(self) -> None:
        config = self.accelerator.unwrap_model(self.model).peft_config["default"]
        config.card(self.finetune_figures).write(Path(self.args.output_dir))


@contextmanager
def _memory_named(args: SFTConfig) -> Iterator[None]:
    """Say what helps where a device has no memory left."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingMemoryError(
            f"Out of memory ({' '.join(str(error).split())[:300]}); lower "
            f"per_device_train_batch_size={args.per_device_train_batch_size} or max_length={args.max_length}, or set "
            "gradient_checkpointing. With resume_from_checkpoint it goes on from the last checkpoint."
        ) from error


def _correct_card(path: Path) -> None:
    """What TRL's template says wrongly: links of local models, a placeholder, and how to load without this package."""
    text = path.read_text(encoding="utf-8")
    text = text.replace("[None](https://huggingface.co/None)", "a local model").replace("licence: license\n", "")
    with replaced_file(path) as partial:
        partial.write_text(_TRL_USAGE.sub("", text), encoding="utf-8")


def _named_plan(inputs: FineTuneInputs, checkpoint: str | None) -> BitRankPlan | None:
    """The plan that is named, if one is; it fits the model and the checkpoint."""
    plan = inputs.plan
    if plan is None and inputs.adapter.plan is not None:
        plan = BitRankPlan.from_pretrained(inputs.adapter.plan)
    if plan is not None and inputs.model is not None:
        _check_names(plan, inputs.model)
    if plan is not None and checkpoint is not None:
        check_checkpoint(checkpoint, plan)
    return plan


def _own_model(inputs: FineTuneInputs, distribution: Distribution) -> PreTrainedModel:
    """The model that was given; where the first process alone has one, one like it without values."""
    model: Any = inputs.model
    if not distribution.first_process_reads:
        return model
    config, dtype = distribution.shared(lambda: (model.config, model.dtype))
    if distribution.is_main_process:
        return model

    def make(config: Any) -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=inputs.args.trust_remote_code)

    return empty_dense_model(config, make)


def _share_base(model: PreTrainedModel, plan: BitRankPlan, distribution: Distribution) -> BitRankPlan:
    """Quantize in the first process, unless that is done, and tell the others what their layers are to hold.

    Returns:
        The plan as it was applied.
    """

    def quantize() -> tuple[BitRankPlan, Any]:
        applied = plan
        if not getattr(model, "is_quantized", False):
            applied = quantize_base(model, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
            note_base(model, applied)
        return applied, getattr(model.config, "quantization_config", None)

    applied, quantization = distribution.shared(quantize)
    if not distribution.is_main_process and quantization is not None:
        empty_base(model, quantization)
    return applied


@contextmanager
def _taken_for_unquantized(model: PreTrainedModel) -> Iterator[None]:
    """For a trainer that only prepares data: transformers allows none for a quantized model before it has adapters.

    Only one that was quantized while it was read: the plan does not apply to a checkpoint that holds codes.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    is_streamed = (
        quantizer is not None and quantizer.quantization_config.quant_method == METHOD and not quantizer.pre_quantized
    )
    if is_streamed:
        model.is_quantized = False
    try:
        yield
    finally:
        if is_streamed:
            model.is_quantized = True


def _uniform_plan(
    model: PreTrainedModel, adapter: AdapterArguments, data: SFTData, checkpoint: str | None
) -> BitRankPlan:
    """The same bits and rank everywhere, calibrated where the backend takes it, or as a checkpoint has it."""
    bits = DEFAULT_BITS if adapter.bits is None else adapter.bits
    quantizer = QuantizerSettings(backend=adapter.quant_backend or "native", group_size=adapter.group_size)  # type: ignore[arg-type]
    plan = uniform_plan(
        model,
        bits,
        DEFAULT_RANK if adapter.r is None else adapter.r,
        target_modules=adapter.target_modules or "all-linear",
        quantizer=quantizer,
    )
    if checkpoint is not None:  # a calibration by other processes or devices could differ in the last bit
        return checkpoint_plan(checkpoint, plan)
    if quantizer.backend == "bitsandbytes" or bits == DENSE_BITS or not adapter.num_calibration_sequences:
        return plan
    return calibrate_plan(plan, model, data.batches(data.train, adapter.num_calibration_sequences))


def _check_names(plan: BitRankPlan, model: nn.Module) -> None:
    names = {name for name, _ in model.named_modules()}
    missing = [name for name in plan if name not in names]
    if missing:
        raise PlanMismatchError(
            f"The plan names {len(missing)} modules that the model does not have, such as {missing[0]!r}; it was made "
            f"for {plan.base_model.name_or_path or 'another model'}."
        )


def _estimate_memory(model: PreTrainedModel, plan: BitRankPlan, args: SFTConfig) -> MemoryEstimate | None:
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in OPTIMIZERS:
        return None
    dense = model
    if getattr(model, "is_quantized", False):
        dense = empty_dense_model(model.config, lambda config: type(model)._from_config(config, dtype=model.dtype))
    return MemoryModel.from_model(dense, target_modules=list(plan), optimizer=optimizer).estimate(plan)
