"""From a model, data and settings to a search problem with an evaluator."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_autoqra.dense_layers import DenseLayer, dense_shape, dense_weight
from peft_autoqra.errors import CalibrationError, UnreachableBudgetError
from peft_autoqra.evaluation.named_objective import LOSS
from peft_autoqra.evaluation.objective import Objective
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.evaluation.sft import SFTData, SFTEvaluator, mean_length
from peft_autoqra.fingerprint import fingerprint_weights
from peft_autoqra.granularity import Granularity, build_search_space
from peft_autoqra.importance.calibration import MAX_GRAM_FEATURES, CalibrationOptions, calibration_fingerprint
from peft_autoqra.importance.calibration_bank import BankSettings, CalibrationBank, build_calibration_bank
from peft_autoqra.importance.module_fit import FitSettings
from peft_autoqra.importance.rank_demand import rank_demand
from peft_autoqra.memory import MemoryBudget, MemoryModel, resolve_budget
from peft_autoqra.memory_estimate import MemoryScope
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.quant.backends import make_backend
from peft_autoqra.search_config import AutoQRASearchConfig
from peft_autoqra.search_costs import SearchCosts, fit_tokens
from peft_autoqra.search_ladder import Ladder, build_ladder
from peft_autoqra.search_problem import SearchProblem
from peft_autoqra.search_space import Candidate, SearchSpace
from peft_autoqra.target_modules import linear_targets

NO_RECIPE = (
    "output", "logging", "log_", "save", "eval", "do_", "hub", "push", "report", "run_name", "project", "trackio",
    "resume", "disable_tqdm", "load_best", "greater_is", "metric_for", "dataloader_num", "dataloader_pre", "seed",
    "data_seed", "dataset_num_proc", "local_rank", "debug",
)  # fmt: skip
"""Beginnings of the names of settings that do not change what a trial gives."""

_NO_SETTINGS = ("output_dir", "cache_dir", "resume", "materialize", "max_seconds", "max_trial_seconds")
"""Likewise, of the search's own."""

NUM_BASELINES = 3
"""Exact allocation, best uniform plan, uniform 4-bit QLoRA."""


@dataclass(frozen=True)
class SearchInputs:
    """What the user gives, and the objective that it names; None is the held-out loss."""

    model: PreTrainedModel
    args: SFTConfig
    train_dataset: Dataset
    eval_dataset: Dataset
    processing_class: PreTrainedTokenizerBase | None
    config: AutoQRASearchConfig
    objective: Objective | None = None


class SearchSetup:
    """Checks everything that is cheap to check, then prepares data; calibrates when first asked to.

    Args:
        inputs: model, data and settings.

    Raises:
        InvalidPlanError: choices, modules or optimizer that cannot be planned.
        MemoryBudgetError: a budget that cannot be read or reached.
        CalibrationError: empty data.
    """

    def __init__(self, inputs: SearchInputs) -> None:
        """Check the budget before the data is touched."""
        config = inputs.config
        self.config, self.args = config, inputs.args
        self.objective = inputs.objective
        targets = config.target_modules or "all-linear"
        self.model = inputs.model
        self.linears: dict[str, DenseLayer] = linear_targets(inputs.model, targets)
        self.memory_model = MemoryModel.from_model(
            inputs.model, target_modules=targets, optimizer=str(getattr(inputs.args.optim, "value", inputs.args.optim))
        )
        self.space: SearchSpace = build_search_space(
            self.memory_model.modules, cast("Granularity", config.granularity), config.bit_choices, config.rank_choices
        )
        self.quantizer = QuantizerSettings(backend=config.quantizer, group_size=config.group_size)
        self.budget: MemoryBudget = resolve_budget(
            config.memory_budget, self.memory_model, cast("MemoryScope | None", config.scope)
        )
        self._bytes_table = self.memory_model.bytes_table(self.space, self.quantizer, self.budget.scope)
        self._check_budget()
        self.data = SFTData(
            inputs.model, inputs.args, inputs.train_dataset, inputs.eval_dataset, inputs.processing_class
        )
        self.calibration_batches = self.data.batches(self.data.train, config.num_calibration_sequences)
        self.bank_settings = BankSettings(
            module_names=tuple(self.linears),
            bit_choices=self.space.bit_choices,
            quantizer=self.quantizer,
            fit=FitSettings(max_rank=self.space.rank_choices[-1]),
        )
        # of the unquantized model, before any candidate's weights take the place of its own
        self.statistics_fingerprint = calibration_fingerprint(
            inputs.model, self.calibration_batches, self.bank_settings.module_names, CalibrationOptions()
        )
        self.base_model = BaseModelInfo(
            name_or_path=inputs.model.config.name_or_path or None,
            revision=getattr(inputs.model.config, "_commit_hash", None),
            fingerprint=fingerprint_weights((name, dense_weight(layer)) for name, layer in self.linears.items()),
        )

    @cached_property
    def costs(self) -> SearchCosts:
        """What trials cost."""
        args = self.args
        step_sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
        epoch_steps = max(1, len(self.data.train) // step_sequences)
        lengths = {split: mean_length(getattr(self.data, split)) for split in ("train", "held_out")}
        judged = self.objective.tokens_per_example(self.data.examples) if self.objective else 0.0
        num_calibrated = min(self.config.num_calibration_sequences, len(self.data.train))
        return SearchCosts(
            full_steps=args.max_steps if args.max_steps > 0 else math.ceil(epoch_steps * args.num_train_epochs),
            step_tokens=step_sequences * lengths["train"],
            eval_tokens=lengths["held_out"] + judged,
            calibration_tokens=num_calibrated * lengths["train"],
            fit_tokens=fit_tokens(map(dense_shape, self.linears.values()), len(self.bank_settings.bit_choices)),
        )

    @property
    def objective_info(self) -> ObjectiveInfo:
        """What is minimized."""
        return self.objective.info if self.objective else HELD_OUT_LOSS

    def ladder(self) -> Ladder:
        """Fidelities of the trials, and how many of each.

        Raises:
            SearchBudgetError: ``max_cost`` does not suffice for the baselines.
        """
        return build_ladder(self.config, self.costs, seed=self.config.seed, num_baselines=NUM_BASELINES)

    def _check_budget(self) -> None:
        smallest = self.problem_with(self.zero_table()).smallest_trainable_bytes
        if smallest > self.budget.limit_bytes:
            raise UnreachableBudgetError(
                f"A budget of {self.budget.limit_bytes:,} bytes leaves no room for an adapter: the smallest plan that "
                f"can be trained takes {smallest:,} bytes. Raise the budget or allow smaller ranks."
            )

    def zero_table(self) -> npt.NDArray[np.float64]:
        """A loss table that knows nothing yet."""
        return np.zeros(self._bytes_table.shape)

    def loss_table(self, bank: CalibrationBank) -> npt.NDArray[np.float64]:
        """Estimated loss after a fine-tune, up to a constant: error left, and the task's demand for rank, nats."""
        return bank.error_table.loss_table(self.space) + rank_demand(self.space)[:, None, :]

    def problem_with(self, loss_table: npt.NDArray[np.float64]) -> SearchProblem:
        """The search problem with a loss table, ``[num_groups, num_bits, num_ranks]``."""
        return SearchProblem(
            self.space, self._bytes_table, loss_table, self.memory_model.untouched_bytes, self.budget.limit_bytes
        )

    def calibration_bank(self, cache_dir: Path, *, show_progress: bool) -> CalibrationBank:
        """The model's calibration: what the cache lacks of it is measured and kept there."""
        return build_calibration_bank(
            self.model,
            self.calibration_batches,
            self.bank_settings,
            directory=cache_dir,
            statistics_fingerprint=self.statistics_fingerprint,
            show_progress=show_progress,
        )

    def calibration_bytes(self) -> tuple[int, int]:
        """Bytes that a calibration keeps at most: of the bank, and of the statistics it is made from."""
        return calibration_bytes(self.linears, self.bank_settings)

    def evaluator(self, bank: CalibrationBank, *, memory_share: float = 1.0) -> SFTEvaluator:
        """Evaluates plans on the model, whose weights it overwrites.

        Args:
            bank: of the model.
            memory_share: of the device's free memory that this process may use.
        """
        self.resident = ResidentModel(
            self.model, self.linears, bank, materialize=self.config.materialize, memory_share=memory_share
        )
        return SFTEvaluator(
            self.resident,
            self.data,
            bank,
            self.args,
            self.config.lora_alpha,
            max_trial_seconds=self.config.max_trial_seconds,
            objective=self.objective,
        )

    def searched_plan(self, candidate: Candidate) -> BitRankPlan:
        """The calibrated native plan of a candidate."""
        return self.plan(self.space.decode(candidate), self.quantizer, compensate=True)

    def plan(self, layers: Mapping[str, LayerPlan], quantizer: QuantizerSettings, *, compensate: bool) -> BitRankPlan:
        """A plan of this model, with shapes, memory and base model filled in."""
        return BitRankPlan(
            layers,
            shapes={n: (s.out_features, s.in_features) for n, s in self.memory_model.modules.items()},
            quantizer=quantizer,
            initialization="compensate" if compensate else "zero",
            base_model=self.base_model,
            memory=self.memory_model.estimate(layers, quantizer),
        )

    def identity(self) -> dict[str, Any]:
        """What makes two searches the same; a log of another one is refused."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in _NO_SETTINGS}
        recipe = {key: str(v) for key, v in self.args.to_dict().items() if not key.startswith(NO_RECIPE)}
        return {
            **settings,
            **recipe,
            "objective": self.objective.identity if self.objective else LOSS,
            "budget_bytes": self.budget.limit_bytes,
            "model": self.base_model.fingerprint,
            "calibration": self.bank_settings.fingerprint(self.statistics_fingerprint),
            "train_dataset": _digest(self.data.train),
            "eval_dataset": _digest(self.data.held_out),
        }


def calibration_bytes(linears: Mapping[str, DenseLayer], settings: BankSettings) -> tuple[int, int]:
    """Bytes that a calibration of these layers keeps at most: of the bank, and of the statistics it is made from."""
    backend, rank = make_backend(settings.quantizer), settings.fit.max_rank
    bank = statistics = 0
    for name, layer in linears.items():
        out_features, in_features = dense_shape(layer)
        statistics += 4 * (min(in_features, MAX_GRAM_FEATURES) * in_features + out_features)
        for bits in settings.bit_choices:
            bank += sum(backend.num_bytes(out_features, in_features, bits, name))
            bank += 2 * min(rank, out_features, in_features) * (out_features + in_features)
    return bank, statistics


def _digest(dataset: Dataset) -> str:
    """Hash of every row of a prepared data set."""
    digest = hashlib.sha256()
    for batch in dataset.iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def load_model(model: str | PreTrainedModel, args: SFTConfig) -> PreTrainedModel:
    """The model itself, or the one of a hub id or folder, in the dtype of its checkpoint."""
    if not isinstance(model, str):
        return model
    return AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))


def load_tokenizer(model: str | PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        CalibrationError: a model made in-process names none.
    """
    name = model if isinstance(model, str) else model.config.name_or_path
    if not name:
        raise CalibrationError("The model names no folder or hub id to take a tokenizer from; give processing_class.")
    return AutoTokenizer.from_pretrained(name)
