"""The search as users call it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_autoqra.evaluation.held_out import held_out_loss
from peft_autoqra.importance.calibration import forward_backward
from peft_autoqra.importance.calibration_bank import CalibrationBank
from peft_autoqra.importance.rank_demand import rank_demand
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.search_config import AutoQRASearchConfig
from peft_autoqra.search_pipeline import SearchPipeline, trial_counts
from peft_autoqra.search_result import SearchResult
from peft_autoqra.search_setup import SearchInputs, SearchSetup, load_model, load_tokenizer
from peft_autoqra.trial import Fidelity, Trial
from peft_autoqra.trial_log import TrialLog

LOG_FILE = "trials.jsonl"
CALIBRATION_FOLDER = "calibration"


class AutoQRASearcher:
    """Finds the weight bits and LoRA ranks that fine-tune best within a memory budget.

    Importance is measured on calibration data and allocated exactly; an evolutionary and a Bayesian stage improve on
    that with short SFTTrainer runs; the best plans and the baselines (uniform 4-bit QLoRA among them, where it fits
    the budget) run once more for longer, and the lowest held-out loss wins. Every trial is on disk when it ends: the
    same call after a crash goes on where the last one stopped.

    Args:
        model: unquantized causal language model, or a hub id or folder of one. While :meth:`run` is under way its
            weights are overwritten with candidates'; they are put back at the end.
        train_dataset: in any format that SFTTrainer takes.
        eval_dataset: likewise; plans are chosen by the loss on it, so report final figures on other data.
        processing_class: the tokenizer; the model's own by default.
        args: the recipe of the real fine-tune.
        search_config: what to search and how much to spend.
        show_progress: show progress bars.

    Raises:
        InvalidPlanError: choices, modules or optimizer that cannot be planned.
        MemoryBudgetError: a budget that cannot be read or reached; the message names the smallest reachable one.
        CalibrationError: empty data.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        args: SFTConfig,
        search_config: AutoQRASearchConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        show_progress: bool = True,
    ) -> None:
        """Check settings and prepare data; nothing long runs yet."""
        self.config = search_config or AutoQRASearchConfig()
        self.setup = SearchSetup(
            SearchInputs(
                model=load_model(model, args),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class or load_tokenizer(model),
                config=self.config,
            )
        )
        self._show_progress = show_progress

    @property
    def output_dir(self) -> Path:
        """Where trials, plan and result go."""
        return Path(self.config.output_dir)

    @property
    def cache_dir(self) -> Path:
        """Where calibration is kept."""
        return Path(self.config.cache_dir) if self.config.cache_dir else self.output_dir / CALIBRATION_FOLDER

    def calibrate(self) -> CalibrationBank:
        """What every bit-width and rank of every layer loses; what the cache holds of it is not measured again.

        Raises:
            CalibrationError: a module that the data never reaches, or values that are not finite.
        """
        return self.setup.calibration_bank(self.cache_dir, show_progress=self._show_progress)

    def run(self) -> SearchResult:
        """Search, save ``plan/`` and ``search_result.json`` in the output directory, and return the result.

        Raises:
            SearchStateError: the output directory holds another search, or every final trial failed.
            CalibrationError: a module that the data never reaches, or values that are not finite.
        """
        start = time.perf_counter()
        log = TrialLog(self.output_dir / LOG_FILE, self.setup.identity(), resume=self.config.resume)
        bank = self.calibrate()
        calibration_seconds = time.perf_counter() - start
        space = self.setup.space
        problem = self.setup.problem_with(bank.error_table.loss_table(space) + rank_demand(space)[:, None, :])
        evaluator = self.setup.evaluator(bank)
        try:
            with tqdm(desc="search", unit="trial", disable=not self._show_progress) as progress:
                pipeline = SearchPipeline(self.setup, problem, evaluator, log, progress)
                progress.reset(total=trial_counts(self.config).total)
                finals = pipeline.run()
                progress.total = progress.n
        finally:
            self.setup.resident.restore()
        candidates = [
            trial for trial in (*finals.searched.values(), *finals.baselines.values()) if trial.loss is not None
        ]
        winner = min(candidates, key=lambda trial: (trial.loss, trial.number))
        plan = winner.plan
        if plan.initialization == "compensate":
            plan = plan.replace(calibration=bank.for_layers(plan))
        result = SearchResult(
            plan=self._described(plan, winner),
            winner=winner,
            baselines=finals.baselines,
            pareto_front=_pareto_front(log.trials, pipeline.short),
            trials=tuple(log.trials),
            budget=self.setup.budget,
            seconds=calibration_seconds + sum(trial.result.seconds for trial in log.trials),
        )
        result.save(self.output_dir)
        return result

    def estimate(self) -> SearchEstimate:
        """What the search will take, from memory arithmetic and one timed forward and backward pass; trains nothing.

        Raises:
            CalibrationError: as :meth:`run`.
        """
        config, setup = self.config, self.setup
        eval_batches = setup.data.batches(setup.data.held_out, config.num_eval_sequences)
        eval_seconds = _seconds_of(lambda: held_out_loss(setup.model, eval_batches[:1])) * len(eval_batches)
        counts = trial_counts(config)
        steps = counts.short * config.short_steps + counts.final * config.final_steps
        memory = setup.memory_model
        return SearchEstimate(
            budget_bytes=setup.budget.limit_bytes,
            budget_scope=setup.budget.scope,
            smallest_bytes=setup.problem_with(setup.zero_table()).smallest_trainable_bytes,
            uniform={
                bits: memory.estimate(memory.uniform(bits, 16), setup.quantizer) for bits in setup.space.bit_choices
            },
            max_trials=counts.total,
            max_seconds=steps * _step_seconds(setup) + counts.total * eval_seconds,
        )

    def _described(self, plan: BitRankPlan, winner: Trial) -> BitRankPlan:
        """The plan with a record of how it was found."""
        return plan.replace(
            provenance={
                "peft_autoqra": version("peft-autoqra"),
                "origin": winner.origin,
                "held_out_loss": winner.loss,
                "steps": winner.fidelity.num_steps,
                "lora_alpha": self.config.lora_alpha,
                "budget_bytes": self.setup.budget.limit_bytes,
                "budget_scope": self.setup.budget.scope,
                "search": self.setup.identity(),
            }
        )


@dataclass(frozen=True, kw_only=True)
class SearchEstimate:
    """What a search will take.

    Attributes:
        budget_bytes: the limit.
        budget_scope: what it limits.
        smallest_bytes: of the smallest plan in the search space that has an adapter.
        uniform: bits to the memory of uniform bits at rank 16.
        max_trials: trials at most.
        max_seconds: of those trials; calibration comes on top, once per model and data.
    """

    budget_bytes: int
    budget_scope: str
    smallest_bytes: int
    uniform: dict[int, MemoryEstimate]
    max_trials: int
    max_seconds: float


def _pareto_front(trials: list[Trial], fidelity: Fidelity) -> tuple[Trial, ...]:
    """Trials of one fidelity that no other beats in both loss and bytes, smallest first."""
    front: list[Trial] = []
    best = math.inf
    completed = [(t.total_bytes, t.loss, t) for t in trials if t.loss is not None and t.fidelity == fidelity]
    for _, loss, trial in sorted(completed, key=lambda entry: entry[:2]):
        if loss < best:
            front.append(trial)
            best = loss
    return tuple(front)


def _step_seconds(setup: SearchSetup) -> float:
    """Seconds of the forward and backward passes of one training step."""
    args = setup.args
    num_sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batches = setup.data.batches(setup.data.train, num_sequences)
    return _seconds_of(partial(forward_backward, setup.model, batches))


def _seconds_of(action: Callable[[], object]) -> float:
    """Seconds of the second of two calls; the first warms up."""
    action()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
