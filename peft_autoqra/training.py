"""A fine-tune with a plan, or with the same bits and rank everywhere, through TRL's SFTTrainer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_autoqra.errors import AutoQRAError, PlanMismatchError
from peft_autoqra.evaluation.sft import SFTData
from peft_autoqra.importance.calibrated_plan import calibrate_plan
from peft_autoqra.memory import OPTIMIZERS, MemoryModel
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_measurement import measure_memory
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, QuantizerSettings
from peft_autoqra.recipe import AdapterArguments
from peft_autoqra.tuner.adapter_card import FineTuneFigures
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.uniform_plan import uniform_plan

RESULT_FILE = "finetune_result.json"
DEFAULT_BITS, DEFAULT_RANK = 4, 16


class TrainingDivergedError(AutoQRAError, ArithmeticError):
    """A fine-tune whose loss is not finite at the end."""


@dataclass(frozen=True, kw_only=True)
class FineTuneInputs:
    """What is trained on what.

    Attributes:
        model: unquantized; quantized in place.
        processing_class: the tokenizer.
        train_dataset: in any format that SFTTrainer takes.
        eval_dataset: likewise.
        args: the recipe.
        adapter: bits and ranks.
    """

    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Dataset
    args: SFTConfig
    adapter: AdapterArguments


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
        train_loss: mean over the steps.
        num_steps: optimizer steps that were taken.
        train_seconds: of the training loop.
        estimated: bytes by part as foretold; None where the optimizer's states are not known.
        measured: bytes of the real tensors at the first optimizer step; None where no step was taken.
        output_dir: where the adapter lies.
    """

    eval_loss: float
    train_loss: float
    num_steps: int
    train_seconds: float
    estimated: MemoryEstimate | None
    measured: MemoryEstimate | None
    output_dir: str

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
        InvalidPlanError: bits, ranks or modules that do not fit the model, or a plan that is not one.
        CalibrationError: no data is left after tokenization.
    """

    def __init__(self, inputs: FineTuneInputs) -> None:
        """Quantize, add adapters and prepare the data."""
        args = inputs.args
        plan = _named_plan(inputs)  # before the data: a wrong name fails at once
        data = SFTData(
            inputs.model,
            args,
            inputs.train_dataset,
            inputs.eval_dataset,
            inputs.processing_class,
            allow_packing=True,
        )
        self.plan = _uniform_plan(inputs, data) if plan is None else plan
        self.estimated = _estimate_memory(inputs.model, self.plan, args)
        config = AutoQRAConfig(
            plan=self.plan,
            lora_alpha=inputs.adapter.lora_alpha,
            lora_dropout=inputs.adapter.lora_dropout,
            task_type="CAUSAL_LM",
        )
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self._memory_probe = _MemoryProbe(self.plan)
        self.trainer = _CardTrainer(
            model=inputs.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=data.processing_class,
            peft_config=config,
            callbacks=[self._memory_probe],
        )

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
        """
        trainer, args = self.trainer, self.trainer.args
        start = time.perf_counter()
        output = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        train_seconds = time.perf_counter() - start
        result = FineTuneResult(
            eval_loss=float(trainer.evaluate()["eval_loss"]),
            train_loss=float(output.training_loss),
            num_steps=int(output.global_step),
            train_seconds=train_seconds,
            estimated=self.estimated,
            measured=self._memory_probe.measured,
            output_dir=str(args.output_dir),
        )
        if not (math.isfinite(result.eval_loss) and math.isfinite(result.train_loss)):
            raise TrainingDivergedError(
                f"The held-out loss is {result.eval_loss} after {result.num_steps} steps (while training: "
                f"{result.train_loss}), so the adapter is not saved. Lower learning_rate={args.learning_rate}, or "
                "train in bf16 or float32."
            )
        trainer.save_model(args.output_dir)
        trainer.finetune_figures = FineTuneFigures(
            held_out_loss=result.eval_loss,
            num_steps=result.num_steps,
            seconds=train_seconds,
            estimated=result.estimated,
            measured=result.measured,
        )
        if self.is_main_process:
            trainer.update_model_card()
            text = json.dumps(result.to_dict(), indent=2)
            Path(args.output_dir, RESULT_FILE).write_text(text, encoding="utf-8")
        return result

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes and prints."""
        return bool(self.trainer.is_world_process_zero())


class _CardTrainer(SFTTrainer):  # type: ignore[misc]
    """Adds the plan and the figures to the model card, which SFTTrainer writes anew with every checkpoint and push."""

    finetune_figures: FineTuneFigures | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self.update_model_card()

    def update_model_card(self) -> None:
        config = self.accelerator.unwrap_model(self.model).peft_config["default"]
        config.card(self.finetune_figures).write(Path(self.args.output_dir))


class _MemoryProbe(TrainerCallback):  # type: ignore[misc]
    """Counts bytes once, at the first optimizer step: gradients and optimizer states are there then."""

    def __init__(self, module_names: Mapping[str, object]) -> None:
        self._module_names = list(module_names)
        self.measured: MemoryEstimate | None = None

    def on_optimizer_step(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        if self.measured is None:
            self.measured = measure_memory(model, self._module_names, optimizer)


def _named_plan(inputs: FineTuneInputs) -> BitRankPlan | None:
    """The plan that is named, if one is; it fits the model."""
    if inputs.adapter.plan is None:
        return None
    plan = BitRankPlan.from_pretrained(inputs.adapter.plan)
    _check_names(plan, inputs.model)
    return plan


def _uniform_plan(inputs: FineTuneInputs, data: SFTData) -> BitRankPlan:
    """The same bits and rank everywhere, calibrated where the backend takes it."""
    adapter = inputs.adapter
    bits = DEFAULT_BITS if adapter.bits is None else adapter.bits
    quantizer = QuantizerSettings(backend=adapter.quant_backend or "native", group_size=adapter.group_size)  # type: ignore[arg-type]
    plan = uniform_plan(
        inputs.model,
        bits,
        DEFAULT_RANK if adapter.r is None else adapter.r,
        target_modules=adapter.target_modules or "all-linear",
        quantizer=quantizer,
    )
    if quantizer.backend == "bitsandbytes" or bits == DENSE_BITS or not adapter.num_calibration_sequences:
        return plan
    return calibrate_plan(plan, inputs.model, data.batches(data.train, adapter.num_calibration_sequences))


def _check_names(plan: BitRankPlan, model: nn.Module) -> None:
    names = {name for name, _ in model.named_modules()}
    missing = [name for name in plan if name not in names]
    if missing:
        raise PlanMismatchError(
            f"The plan names {len(missing)} modules that the model does not have, such as {missing[0]!r}; it was made "
            f"for {plan.base_model.name_or_path or 'another model'}."
        )


def _estimate_memory(model: nn.Module, plan: BitRankPlan, args: SFTConfig) -> MemoryEstimate | None:
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in OPTIMIZERS:
        return None
    memory_model = MemoryModel.from_model(model, target_modules=list(plan), optimizer=optimizer)
    return memory_model.estimate(plan)
