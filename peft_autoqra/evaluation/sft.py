"""Trials by TRL: tokenization once, then short SFTTrainer runs on the resident model."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from peft_autoqra.errors import CalibrationError, InvalidPlanError
from peft_autoqra.evaluation.held_out import HeldOutLoss, held_out_loss, predicts_something
from peft_autoqra.evaluation.objective import HeldOutExamples, Objective
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.evaluation.shared_adapter import SharedAdapter
from peft_autoqra.evaluation.supernet import Supernet
from peft_autoqra.evaluation.time_limit import TimeLimitExceeded, call_within
from peft_autoqra.evaluation.trial_memory import is_out_of_memory, memory_freed
from peft_autoqra.evaluation.trial_trainer import TrialTrainer
from peft_autoqra.importance.calibration import flags_kept
from peft_autoqra.importance.calibration_bank import CalibrationBank
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.trial import Fidelity, TrialResult, TrialStatus
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.dense_adapter import add_dense_adapter

OnStep = Callable[[int, nn.Module], None]
LENGTH_SAMPLE = 1000


class SFTData:
    """Training and held-out data as the fine-tune will see them: tokenized, masked and collated by SFTTrainer.

    Args:
        model: decides what the trainer does with the data; not trained.
        args: the recipe of the fine-tune.
        train_dataset: in any format that SFTTrainer takes; held in memory or mapped, not streamed.
        eval_dataset: likewise.
        processing_class: the tokenizer.
        allow_packing: take recipes that put several texts into one sequence. A search does not: it scores sequences
            one by one.

    Raises:
        InvalidPlanError: the model is quantized already.
        CalibrationError: packing, or data that is of another kind, empty, without the columns that SFTTrainer takes,
            or without a token to predict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None,
        *,
        allow_packing: bool = False,
    ) -> None:
        """Tokenize both data sets."""
        if not allow_packing and (args.packing or args.eval_packing or args.padding_free):
            raise CalibrationError(
                "Packing is not supported by the search; set packing: false, and no eval_packing or padding_free."
            )
        if getattr(model, "is_quantized", False):
            raise InvalidPlanError(
                "The base model is quantized already; give the unquantized one. In Python a quantized base can be "
                "trained with get_peft_model and SFTTrainer."
            )
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for name, dataset in datasets.items():
            _check_dataset(name, dataset)
        quiet = quiet_arguments(args, tempfile.gettempdir())
        quiet.dataset_kwargs = args.dataset_kwargs
        try:
            trainer = SFTTrainer(model=model, args=quiet, processing_class=processing_class, **datasets)
        except (KeyError, ValueError) as error:
            columns = {name: dataset.column_names for name, dataset in datasets.items()}
            raise CalibrationError(
                f"SFTTrainer cannot prepare the data ({type(error).__name__}: {error}). Columns: {columns}; it takes "
                f"{args.dataset_text_field!r} (dataset_text_field), 'messages', 'prompt' and 'completion', or "
                "'input_ids'."
            ) from error
        self.given, self._max_length = eval_dataset, args.max_length
        self.train: Dataset = trainer.train_dataset
        self.held_out: Dataset = trainer.eval_dataset
        self.processing_class = trainer.processing_class
        self._collate = trainer.data_collator
        self._batch_size = args.per_device_eval_batch_size
        if len(self.train) == 0 or len(self.held_out) == 0:
            raise CalibrationError("No example is left after tokenization; check the columns and max_length.")
        if not any(map(predicts_something, self._loader(self.held_out))):  # one batch, unless something is wrong
            raise CalibrationError("eval_dataset holds no token to predict; check completions, masks and max_length.")

    @property
    def examples(self) -> HeldOutExamples:
        """The held-out data as it was given."""
        return HeldOutExamples(
            self.given, self.processing_class, self._batch_size, self._max_length, mean_length(self.held_out)
        )

    def batches(self, dataset: Dataset, num_sequences: int) -> list[Mapping[str, Any]]:
        """The first sequences of a prepared data set, collated in order."""
        return list(self._loader(dataset.select(range(min(num_sequences, len(dataset))))))

    def _loader(self, dataset: Dataset) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self._batch_size, collate_fn=self._collate)


@dataclass(frozen=True)
class _Scored:
    """A trial's result without what is known outside of it."""

    loss: float
    sequence_losses: tuple[float, ...]
    metrics: dict[str, float]


class SFTEvaluator:
    """Evaluates plans on one resident model; an :class:`~peft_autoqra.trial.Evaluator`.

    At 0 steps a plan's untrained loss is taken, with its initial adapters. Above, SFTTrainer trains the adapters for
    that many steps with the recipe's settings and the fidelity's seed, so that all plans see the same batches in the
    same order. With ``shared_steps`` a plan is scored untrained with the adapters of a
    :class:`~peft_autoqra.evaluation.supernet.Supernet`, which the first trial of this kind trains: its seconds include
    that, and ``metrics["supernet_seconds"]`` tells how many.

    Args:
        resident: the model.
        data: prepared data.
        bank: calibration for the initial adapters.
        args: the recipe of the fine-tune.
        lora_alpha: of the adapters' scaling (:mod:`~peft_autoqra.tuner.rank_scaling`).
        shared_plans: what a supernet is trained under; needed for fidelities with ``shared_steps`` alone.
        max_trial_seconds: a trial that takes longer is stopped and has failed; None is no limit.
        objective: what the loss of a trial is of; None is the held-out loss, which is in ``metrics`` otherwise.

    Raises:
        InvalidPlanError: ``max_trial_seconds`` is not above 0.
    """

    def __init__(
        self,
        resident: ResidentModel,
        data: SFTData,
        bank: CalibrationBank,
        args: SFTConfig,
        lora_alpha: int,
        shared_plans: Sequence[BitRankPlan] = (),
        *,
        max_trial_seconds: float | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Nothing is evaluated yet."""
        self._objective = objective
        if max_trial_seconds is not None and not max_trial_seconds > 0:
            raise InvalidPlanError(f"max_trial_seconds={max_trial_seconds} must be above 0, or None for no limit.")
        self._resident, self._data, self._bank, self._args = resident, data, bank, args
        self._lora_alpha, self._max_trial_seconds = lora_alpha, max_trial_seconds
        self._shared_plans = tuple(shared_plans)
        self._shared: dict[Fidelity, SharedAdapter] = {}
        self._held_out_batches: dict[int, list[Mapping[str, Any]]] = {}

    @memory_freed()
    def evaluate(self, plan: BitRankPlan, fidelity: Fidelity) -> TrialResult:
        """Evaluate one plan; whatever goes wrong becomes a failed result, and the model is left as it was."""
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        try:
            if fidelity.shared_steps:
                metrics = self._train_supernet(fidelity)
            with left_as_it_was(self._resident.model):  # outside of the limit, which could cut its clean-up short
                scored = call_within(self._max_trial_seconds, lambda: self._scored(plan, fidelity))
        except Exception as error:
            message = self._description(error)
            return TrialResult(status=TrialStatus.FAILED, seconds=time.perf_counter() - start, error=message)
        return TrialResult(
            status=TrialStatus.COMPLETED,
            seconds=time.perf_counter() - start,
            loss=scored.loss,
            sequence_losses=scored.sequence_losses,
            metrics=metrics | scored.metrics,
        )

    def learning_curve(
        self, plan: BitRankPlan, fidelity: Fidelity, checkpoints: Collection[int]
    ) -> dict[int, HeldOutLoss]:
        """Held-out losses along one training run, by the number of steps before them; 0 is before training.

        With a learning rate that does not decay these are the losses of runs of that many steps.

        Args:
            plan: what is trained.
            fidelity: its steps end the run.
            checkpoints: numbers of steps.
        """
        curve = {}
        if 0 in checkpoints:
            self._load_untrained(plan, fidelity)
            curve[0] = self._held_out_loss(self._resident.model, fidelity)

        def record(step: int, model: nn.Module) -> None:
            if step in checkpoints:
                curve[step] = self._held_out_loss(model, fidelity)

        with left_as_it_was(self._resident.model):
            self._trained(plan, fidelity, record)
        return curve

    def _scored(self, plan: BitRankPlan, fidelity: Fidelity) -> _Scored:
        if fidelity.num_steps == 0:
            self._load_untrained(plan, fidelity)
            return self._score(self._resident.model, fidelity)
        return self._score(self._trained(plan, fidelity), fidelity)

    def _load_untrained(self, plan: BitRankPlan, fidelity: Fidelity) -> None:
        shared = self._shared[_supernet_training(fidelity)] if fidelity.shared_steps else None
        self._resident.load(plan, with_corrections=True, shared=shared)

    def _train_supernet(self, fidelity: Fidelity) -> dict[str, float]:
        """Train the shared adapter unless it is there; what that cost, for the trial that had to."""
        if fidelity.num_steps:
            raise InvalidPlanError(f"{fidelity} both trains and borrows adapters; set num_steps or shared_steps to 0.")
        training = _supernet_training(fidelity)
        if training in self._shared:
            return {}
        start = time.perf_counter()
        supernet = Supernet(self._resident, self._shared_plans, self._lora_alpha, self._bank.settings.fit.max_rank)
        with left_as_it_was(self._resident.model), tempfile.TemporaryDirectory() as directory:
            self._shared[training] = supernet.train(
                lambda model, callback: self._train(model, training, directory, [callback]), fidelity.seed
            )
        return {"supernet_seconds": time.perf_counter() - start}

    def _trained(self, plan: BitRankPlan, fidelity: Fidelity, on_step: OnStep | None = None) -> nn.Module:
        self._resident.load(plan, with_corrections=False)
        calibrated = plan
        if plan.initialization == "compensate":
            calibrated = plan.replace(calibration=self._bank.for_layers(plan))
        config = AutoQRAConfig(plan=calibrated, lora_alpha=self._lora_alpha, task_type="CAUSAL_LM")
        torch.manual_seed(fidelity.seed)
        with tempfile.TemporaryDirectory() as directory:
            peft_model = add_dense_adapter(self._resident.model, config)
            self._train(peft_model, fidelity, directory, [] if on_step is None else [_StepCallback(on_step)])
        return peft_model

    def _train(self, model: nn.Module, fidelity: Fidelity, directory: str, callbacks: list[TrainerCallback]) -> None:
        args = quiet_arguments(self._args, directory)
        args.max_steps = fidelity.num_steps
        args.seed = args.data_seed = fidelity.seed
        args.learning_rate *= fidelity.learning_rate_factor
        trainer = TrialTrainer(
            model=model,
            args=args,
            train_dataset=self._data.train,
            processing_class=self._data.processing_class,
            callbacks=callbacks,
        )
        for callback in (PrinterCallback, ProgressCallback):  # they print a line at the end of a run
            trainer.remove_callback(callback)
        trainer.train()

    def _score(self, model: nn.Module, fidelity: Fidelity) -> _Scored:
        """The held-out loss, or the objective in its place.

        Raises:
            ArithmeticError: it is not finite.
        """
        loss = self._held_out_loss(model, fidelity)
        if not math.isfinite(loss.mean):
            raise ArithmeticError(f"the held-out loss is {loss.mean}")
        if self._objective is None:
            return _Scored(loss.mean, loss.sequence_losses, {})
        info = self._objective.info
        score = self._objective.score(model, self._data.examples, fidelity.num_eval_sequences)
        if not math.isfinite(score.value):
            raise ArithmeticError(f"{info.name} is {score.value}")
        values = tuple(info.sign * value for value in score.example_values)
        return _Scored(info.sign * score.value, values, {"held_out_loss": loss.mean, info.name: score.value})

    def _held_out_loss(self, model: nn.Module, fidelity: Fidelity) -> HeldOutLoss:
        num = fidelity.num_eval_sequences
        if num not in self._held_out_batches:
            self._held_out_batches[num] = self._data.batches(self._data.held_out, num)
        return held_out_loss(model, self._held_out_batches[num])

    def _description(self, error: Exception) -> str:
        """What went wrong in a trial, and what helps where that is known."""
        description = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            return f"Out of memory ({description}); lower per_device_train_batch_size or max_length."
        if isinstance(error, TimeLimitExceeded):
            return f"{description} (max_trial_seconds); raise that, or lower the number of steps."
        return description


def _supernet_training(fidelity: Fidelity) -> Fidelity:
    """The training run behind a fidelity with shared steps; the same for all numbers of scored sequences."""
    return replace(fidelity, num_steps=fidelity.shared_steps, shared_steps=0, num_eval_sequences=0)


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Calls a function with the number of finished steps and the model after each of them."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def on_step_end(
        self, _args: object, state: TrainerState, _control: object, *, model: nn.Module, **_: object
    ) -> None:
        """Transformers' hook."""
        self._on_step(state.global_step, model)


def quiet_arguments(args: SFTConfig, output_dir: str) -> SFTConfig:
    """The recipe for a run that saves, evaluates, logs and reports nothing, on data that is prepared already."""
    quiet = copy.copy(args)
    quiet.output_dir = output_dir
    quiet.save_strategy = quiet.eval_strategy = quiet.logging_strategy = "no"
    quiet.load_best_model_at_end = quiet.push_to_hub = False
    quiet.report_to = []
    quiet.disable_tqdm = True
    quiet.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return quiet


@contextmanager
def left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Adapters, flags, gradient checkpointing and its hooks are gone at the end, also after an error.

    PEFT, TRL and transformers may each hook the embeddings, and of several hooks transformers removes the last only.
    """
    embeddings = model.get_input_embeddings()
    hooks = set(embeddings._forward_hooks)
    checkpointing = [(m, m.gradient_checkpointing) for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    use_cache = model.config.use_cache
    try:
        with flags_kept(model):
            yield
    finally:
        _remove_adapters(model)
        for hook in embeddings._forward_hooks.keys() - hooks:
            del embeddings._forward_hooks[hook]
        for module, was_checkpointing in checkpointing:
            module.gradient_checkpointing = was_checkpointing
        model.config.use_cache = use_cache


def _remove_adapters(model: nn.Module) -> None:
    """As PEFT's ``unload()``, which there is no object for when adding adapters failed half-way."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def mean_length(dataset: Dataset) -> float:
    """Tokens of a prepared sequence, on average over the first thousand."""
    rows = dataset.select(range(min(LENGTH_SAMPLE, len(dataset))))
    return sum(map(len, rows["input_ids"])) / len(rows)


def _check_dataset(name: str, dataset: object) -> None:
    if not isinstance(dataset, Dataset):
        raise CalibrationError(f"{name} is a {type(dataset).__name__}; give one datasets.Dataset, not streamed.")
    if len(dataset) == 0:
        raise CalibrationError(f"{name} is empty; give at least one example.")
