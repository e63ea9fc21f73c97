"""``report_to``: a search is one run of a tracker, its trials are the steps."""

from __future__ import annotations

import copy
import json
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TrainerControl, TrainerState
from trl import SFTConfig

from peft_autoqra.reporting_integrations import ReportingIntegration, environment
from peft_autoqra.search_callback import SearchCallback, SearchProgress
from peft_autoqra.search_config import AutoQRASearchConfig
from peft_autoqra.search_metrics import summary_metrics, trial_metrics
from peft_autoqra.search_result import SearchResult
from peft_autoqra.trial import Trial

TRACKING_FILE = "tracking.json"


class SearchTracker(SearchCallback):
    """Reports a search through transformers' integrations, so that it lands beside its fine-tune.

    A trial is a step, counted in the order of telling. When a stopped search goes on it reports to the same run, where
    the tracker can go on with one, and first what the run lacks. A tracker that fails is left out with one warning:
    trials are on disk, and it is told what it lacks when the search is started again.

    Args:
        integrations: whom to report to.
        args: the recipe; ``run_name``, ``project`` and the ``trackio_`` settings hold for the search too.
        config: of the search; stands in the run's configuration as ``autoqra_search``.
        model: its configuration, and the recipe, are the rest of that.
    """

    def __init__(
        self,
        integrations: Sequence[ReportingIntegration],
        args: SFTConfig,
        config: AutoQRASearchConfig,
        model: PreTrainedModel,
    ) -> None:
        """Nothing is reported yet."""
        self._integrations, self._config = integrations, config
        self._directory = Path(config.output_dir)
        self._model = _DescribedModel(_described(model.config, config), model.num_parameters())
        self._args = copy.copy(args)
        self._args.output_dir = config.output_dir
        self._given_name = args.run_name
        self._state: dict[str, Any] = {}
        self._opened_wandb = False

    def on_search_begin(self, progress: SearchProgress) -> None:
        """Open the runs, and report what they lack of earlier trials."""
        self._read_state()
        run_id = self._state["run_id"]
        self._args.run_name = self._run_name(run_id)
        resumed = {} if "WANDB_RUN_ID" in os.environ else {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"}
        with environment(WANDB_WATCH="false", **resumed):
            self._for_each(self._open)
        self._for_each(lambda integration: self._report(integration, progress))

    def on_trial_end(self, trial: Trial, progress: SearchProgress) -> None:
        """Report it."""
        self._for_each(lambda integration: self._report(integration, progress))

    def on_search_end(self, result: SearchResult | None, progress: SearchProgress) -> None:
        """Report the result, and close the runs."""
        if not self._state:  # nothing was opened: a callback before this one ended the search
            return
        if result is not None:
            self._for_each(lambda integration: self._summarize(integration, result))
        self._for_each(self._close)

    def _run_name(self, run_id: str) -> str:
        """Another one than that of the fine-tune with this recipe; without a name one that no other search has."""
        return f"{self._given_name}-search" if self._given_name else f"{self._directory.resolve().name}-{run_id}"

    def _open(self, integration: ReportingIntegration) -> None:
        if integration.name == "wandb":
            self._opened_wandb = _wandb().run is None
        if integration.name == "tensorboard" and integration.callback.logging_dir is None:  # not in the environment
            integration.callback.logging_dir = str(self._directory / "runs" / self._args.run_name)
        self._call(integration, "on_init_end")
        self._call(integration, "on_train_begin")

    def _report(self, integration: ReportingIntegration, progress: SearchProgress) -> None:
        calibration_cost = progress.ended_cost - sum(trial.cost for trial in progress.trials)
        for num in range(integration.num_trials + 1, progress.num_told + 1):
            told = progress.trials[:num]
            metrics = trial_metrics(
                told, calibration_cost=calibration_cost, seed=self._config.seed, objective=progress.objective
            )
            self._call(integration, "on_log", step=num, logs=metrics)
            integration.num_trials = num

    def _summarize(self, integration: ReportingIntegration, result: SearchResult) -> None:
        if not integration.has_summary:
            self._call(integration, "on_log", step=integration.num_trials, logs=summary_metrics(result))
            integration.has_summary = True

    def _close(self, integration: ReportingIntegration) -> None:
        self._call(integration, "on_train_end")
        if integration.name == "wandb" and self._opened_wandb:  # a fine-tune after it would go on with this run
            _wandb().finish()

    def _call(self, integration: ReportingIntegration, hook: str, *, step: int = 0, **arguments: Any) -> None:
        state = TrainerState(global_step=step)
        getattr(integration.callback, hook)(self._args, state, TrainerControl(), model=self._model, **arguments)

    def _for_each(self, action: Callable[[ReportingIntegration], None]) -> None:
        """With all that have not failed; then keep on disk what they were told."""
        for integration in self._integrations:
            if integration.has_failed:
                continue
            try:
                with redirect_stdout(sys.stderr):  # standard output is for results
                    action(integration)
            except Exception as error:
                integration.has_failed = True
                warnings.warn(
                    f"The search goes on without {integration.name}, which failed ({type(error).__name__}: {error}). "
                    "What it lacks is reported when the search is started again.",
                    stacklevel=2,
                )
        self._write_state()

    def _read_state(self) -> None:
        path = self._directory / TRACKING_FILE
        default: dict[str, Any] = {"run_id": secrets.token_hex(4), "told": {}}
        self._state = json.loads(path.read_text("utf-8")) if path.exists() else default
        for integration in self._integrations:
            known = self._state["told"].get(integration.name, {"num_trials": 0, "has_summary": False})
            integration.num_trials, integration.has_summary = known["num_trials"], known["has_summary"]
            integration.has_failed = False

    def _write_state(self) -> None:
        for integration in self._integrations:
            self._state["told"][integration.name] = {
                "num_trials": integration.num_trials,
                "has_summary": integration.has_summary,
            }
        partial = self._directory / f"{TRACKING_FILE}.partial"
        partial.write_text(json.dumps(self._state), encoding="utf-8")
        partial.replace(self._directory / TRACKING_FILE)


@dataclass(frozen=True)
class _DescribedModel:
    """What integrations read of a model; the model itself, whose weights change all the time, is not theirs.

    Attributes:
        config: of the model and of the search.
        size: parameters of the model.
    """

    config: PreTrainedConfig
    size: int

    def num_parameters(self) -> int:
        """As in ``PreTrainedModel``."""
        return self.size


def _described(model_config: PreTrainedConfig, config: AutoQRASearchConfig) -> PreTrainedConfig:
    described = copy.deepcopy(model_config)
    described.autoqra_search = asdict(config)
    return described


def _wandb() -> Any:
    import wandb  # noqa: PLC0415 optional

    return wandb
