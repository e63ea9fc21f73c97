"""The search as users call it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_autoqra.errors import SearchStateError
from peft_autoqra.evaluation.named_objective import ExampleLosses, make_objective
from peft_autoqra.evaluation.objective import Objective
from peft_autoqra.executors.executor import TrialExecutor
from peft_autoqra.executors.futures_executor import FuturesExecutor
from peft_autoqra.executors.in_process import InProcessExecutor
from peft_autoqra.executors.ray_executor import RayExecutor
from peft_autoqra.executors.worker_files import check_can_be_sent
from peft_autoqra.executors.worker_source import WorkerSource
from peft_autoqra.importance.calibration_bank import CalibrationBank
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_points import front_of
from peft_autoqra.progress_bar import ProgressBar
from peft_autoqra.progress_log import ProgressLog
from peft_autoqra.reporting_integrations import make_integrations
from peft_autoqra.search.ledger import Arm
from peft_autoqra.search_callback import SearchCallback
from peft_autoqra.search_config import AutoQRASearchConfig
from peft_autoqra.search_estimate import SearchEstimate, estimate_search
from peft_autoqra.search_lock import search_lock
from peft_autoqra.search_loop import SearchLoop, elapsed_seconds
from peft_autoqra.search_result import ComparedPlan, SearchResult
from peft_autoqra.search_session import SearchSession
from peft_autoqra.search_setup import SearchInputs, SearchSetup, load_model, load_tokenizer
from peft_autoqra.search_tracker import SearchTracker
from peft_autoqra.trial import Evaluator, Trial, TrialResult
from peft_autoqra.trial_log import TrialLog

if TYPE_CHECKING:
    from evaluate import EvaluationModule

LOG_FILE = "trials.jsonl"
CALIBRATION_FOLDER = "calibration"


class AutoQRASearcher:
    """Finds the weight bits and LoRA ranks that fine-tune best within a memory budget.

    Importance is measured on calibration data and allocated exactly; an evolutionary and a Bayesian stage improve on
    that with short SFTTrainer runs; the best plans and the baselines (uniform 4-bit QLoRA among them, where it fits
    the budget) are confirmed with further seeds. The winner is the plan with the least held-out loss (or loss of
    another objective), or a simpler one that it is not better than beyond the 95% interval. All of it costs at most
    ``max_cost`` full fine-tunes.
    Every trial is on disk when it ends: the same call after a crash goes on where the last one stopped, and asks for
    the same trials in the same order. With a scheduler of your own use :meth:`ask` and :meth:`tell` instead of
    :meth:`run`.

    Args:
        model: unquantized causal language model, or a hub id or folder of one. While :meth:`run` is under way its
            weights are overwritten with candidates'; they are put back at the end.
        train_dataset: in any format that SFTTrainer takes.
        eval_dataset: likewise; plans are chosen by the loss on it, so report final figures on other data.
        processing_class: the tokenizer; the model's own by default.
        args: the recipe of the real fine-tune. The search is one run of each tracker in its ``report_to``.
        search_config: what to search and how much to spend.
        show_progress: show progress bars, on terminals and in notebooks; ``disable_tqdm`` of the recipe goes before.
        callbacks: are told what happens in :meth:`run`.
        objective: what is minimized in place of ``search_config.objective``: a metric of the `evaluate` library, a
            function of model, tokenizer and examples that gives a loss for each example, or an
            :class:`~peft_autoqra.evaluation.objective.Objective`.

    Raises:
        InvalidPlanError: choices, modules or optimizer that cannot be planned.
        MemoryBudgetError: a budget that cannot be read or reached; the message names the smallest reachable one.
        CalibrationError: empty data.
        RecipeError: a tracker of ``report_to`` that transformers does not know.
        EvaluationError: an objective that does not exist, or that ``eval_dataset`` does not suffice for.
        MissingDependencyError: a tracker, or what an objective needs, is not installed.
    """

    def __init__(  # noqa: PLR0913 - what a trainer takes, and what a search adds to it
        self,
        model: str | PreTrainedModel,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        args: SFTConfig,
        search_config: AutoQRASearchConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        show_progress: bool = True,
        callbacks: Sequence[SearchCallback] = (),
        objective: Objective | EvaluationModule | ExampleLosses | None = None,
    ) -> None:
        """Check settings and prepare data; nothing long runs yet."""
        self.config = search_config or AutoQRASearchConfig()
        integrations = make_integrations(args.report_to)
        judge = make_objective(objective or self.config.objective, max_new_tokens=self.config.max_new_tokens)
        if judge is not None:
            judge.check(eval_dataset)  # before a model is loaded
        self.setup = SearchSetup(
            SearchInputs(
                model=load_model(model, args),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class or load_tokenizer(model),
                config=self.config,
                objective=judge,
            )
        )
        self._show_progress = show_progress and not args.disable_tqdm
        self._callbacks = (
            *([ProgressBar()] if self._show_progress else []),
            ProgressLog(),
            *([SearchTracker(integrations, args, self.config, self.setup.model)] if integrations else []),
            *callbacks,
        )
        self._opened: _Open | None = None

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

    def run(self, executor: TrialExecutor | Executor | None = None, *, deterministic: bool = False) -> SearchResult:
        """Search, save ``plan/`` and ``search_result.json`` in the output directory, and return the result.

        Args:
            executor: evaluates the trials: :class:`~peft_autoqra.executors.ray_executor.RayExecutor`, one of your own,
                or a pool of processes, Dask's or MPI's too, that is a ``concurrent.futures.Executor``
                (:class:`~peft_autoqra.executors.futures_executor.FuturesExecutor` says more of it). None evaluates in
                this process.
            deterministic: propose trials as if a fixed number were under way, so that neither the number of workers
                nor the order in which they end changes what is found.

        Raises:
            ExecutorError: the executor cannot be used, cannot be sent the objective, or has lost all its workers; the
                same search can go on.
            SearchBudgetError: ``max_cost`` does not suffice for the baselines.
            SearchStateError: another search runs in the output directory, or it holds one with other settings or of
                another version, or every trial at the last fidelity failed.
            CalibrationError: a module that the data never reaches, or values that are not finite.
        """
        used = FuturesExecutor(executor) if isinstance(executor, Executor) else executor or InProcessExecutor()
        with closing(used):
            if isinstance(used, FuturesExecutor | RayExecutor):
                check_can_be_sent(self.setup.objective)  # before calibration, which takes long
            return self._run(used, deterministic=deterministic)

    def _run(self, executor: TrialExecutor, *, deterministic: bool) -> SearchResult:
        with self.opened():
            opened = self._open
            loop = SearchLoop(
                opened.session,
                self._callbacks,
                calibration_seconds=opened.calibration_seconds,
                deterministic=deterministic,
            )
            with loop.announced() as announce:
                with closing(self._worker_source()) as source, closing(executor):  # workers end before their files do
                    executor.open(source)
                    loop.run(executor)
                return announce(self.result())

    def _worker_source(self) -> WorkerSource:
        return WorkerSource(self.setup, self._open.bank, cache_dir=self.cache_dir, directory=self.output_dir)

    @contextmanager
    def opened(self) -> Iterator[AutoQRASearcher]:
        """Hold the output directory for :meth:`ask`, :meth:`tell` and :meth:`result`; :meth:`run` does so itself.

        Calibrates, and replays what the directory holds of the search.

        Raises:
            SearchBudgetError, SearchStateError, CalibrationError: as :meth:`run`.
        """
        start = time.perf_counter()
        ladder = self.setup.ladder()
        with search_lock(self.output_dir):
            log = TrialLog(self.output_dir / LOG_FILE, self.setup.identity(), resume=self.config.resume)
            bank = self.calibrate()
            problem = self.setup.problem_with(self.setup.loss_table(bank))
            session = SearchSession(self.setup, problem, ladder, log)
            seconds = time.perf_counter() - start
            self._opened = _Open(session=session, bank=bank, calibration_seconds=seconds)
            try:
                yield self
            finally:
                self._opened = None

    def ask(self, num: int = 1) -> list[Trial]:
        """Trials to be evaluated, wherever and in whichever order, inside of ``with searcher.opened():``.

        Those come first that a stopped search left open. There may be fewer than asked for while results of others
        are needed to go on, and there are none when the search is over. ``Trial.to_dict()`` is JSON-ready;
        :meth:`evaluator` evaluates one in this process.

        Raises:
            SearchStateError: the searcher is not opened.
            ValueError: ``num`` is below 1.
        """
        if num < 1:
            raise ValueError(f"num={num} must be at least 1.")
        return self._open.session.ask(num)

    def tell(self, trial: Trial, result: TrialResult) -> None:
        """Give the result of a trial; it is on disk when this returns.

        Raises:
            SearchStateError: the searcher is not opened, or the trial is not under way.
        """
        self._open.session.tell(trial, result)

    def result(self) -> SearchResult:
        """The answer as things stand, saved in the output directory.

        Raises:
            SearchStateError: the searcher is not opened, or no trial at the last fidelity succeeded.
        """
        opened = self._open
        session = opened.session
        decision = session.decision()
        winner = ComparedPlan(trials=tuple(session.trials_of(decision.winner, decision.variant)))
        baselines = {name: session.trials_of(arm, session.variant(arm)) for name, arm in session.baselines().items()}
        plan = winner.first.plan
        if plan.initialization == "compensate":
            plan = plan.replace(calibration=opened.bank.for_layers(plan))
        result = SearchResult(
            plan=self._described(plan, winner),
            winner=winner,
            baselines={name: ComparedPlan(trials=tuple(trials)) for name, trials in baselines.items() if trials},
            pareto_front=tuple(
                front_of(
                    [trial for trial in session.trials_at(session.engine.ledger.top) if trial.loss is not None],
                    lambda trial: (trial.total_bytes, trial.loss or 0.0),
                )
            ),
            trials=tuple(session.log.trials),
            budget=self.setup.budget,
            cost=session.cost,
            max_cost=self.config.max_cost,
            seconds=opened.calibration_seconds + elapsed_seconds(session.log.trials),
            surrogate_checks=tuple(session.engine.surrogate_checks),
            best_searched=self._compared(session.best_searched()),
            num_searched=session.engine.num_searched,
            spending=session.ladder.to_dict(),
            objective=self.setup.objective_info,
        )
        result = replace(result, plan=result.described_plan())
        result.save(self.output_dir)
        return result

    @property
    def is_done(self) -> bool:
        """Nothing is left to ask for and every trial was told; :meth:`ask` may give nothing before, to wait.

        Raises:
            SearchStateError: the searcher is not opened.
        """
        return self._open.session.is_done

    @contextmanager
    def evaluator(self) -> Iterator[Evaluator]:
        """What evaluates trials in this process, inside of ``with searcher.opened():``; the model is restored after.

        Raises:
            SearchStateError: the searcher is not opened.
        """
        with closing(self._worker_source()) as source:
            yield source.evaluator()

    def _compared(self, arm: Arm | None) -> ComparedPlan | None:
        session = self._open.session
        return None if arm is None else ComparedPlan(trials=tuple(session.trials_of(arm, session.variant(arm))))

    def estimate(self) -> SearchEstimate:
        """What the search will take, from memory arithmetic and one timed forward and backward pass; trains nothing.

        Raises:
            SearchBudgetError, CalibrationError: as :meth:`run`.
        """
        return estimate_search(self.setup)

    @property
    def _open(self) -> _Open:
        if self._opened is None:
            raise SearchStateError("The searcher is not opened; use `with searcher.opened():` around ask and tell.")
        return self._opened

    def _described(self, plan: BitRankPlan, winner: ComparedPlan) -> BitRankPlan:
        """The plan with a record of how it was found."""
        return plan.replace(
            provenance={
                "peft_autoqra": version("peft-autoqra"),
                "origin": winner.first.origin,
                **self._figures(winner),
                "steps": winner.first.fidelity.num_steps,
                "learning_rate_factor": winner.first.fidelity.learning_rate_factor,
                "lora_alpha": self.config.lora_alpha,
                "budget_bytes": self.setup.budget.limit_bytes,
                "budget_scope": self.setup.budget.scope,
                "search": self.setup.identity(),
            }
        )

    def _figures(self, winner: ComparedPlan) -> dict[str, Any]:
        """Of the plan's record: its held-out loss, and what it was chosen for where that is another figure."""
        info = self.setup.objective_info
        if self.setup.objective is None:
            return {"held_out_loss": winner.loss}
        figures = {"objective": info.to_dict(), "objective_value": winner.metric(info.name)}
        return {"held_out_loss": winner.metric("held_out_loss"), **figures}


@dataclass(frozen=True, kw_only=True)
class _Open:
    """What a searcher has while it holds its directory."""

    session: SearchSession
    bank: CalibrationBank
    calibration_seconds: float
