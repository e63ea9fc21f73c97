"""Tasks of lm-evaluation-harness, by name or as YAML files of your own."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_autoqra.errors import EvaluationError, MissingDependencyError
from peft_autoqra.evaluation.jackknife import example_values
from peft_autoqra.evaluation.objective import GENERATED_TOKEN, HeldOutExamples, Score
from peft_autoqra.objective_info import ObjectiveInfo

PREFIX = "lm_eval:"
FEWSHOT_SEED = 1234  # the harness's own default
COST_EXAMPLES = 100
DEFAULT_GENERATED = 256  # tokens that the harness generates where a task names no number


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks."""

    task: str
    info: ObjectiveInfo
    score: Score


class HarnessTasks:
    """Loaded tasks, which any number of models can be judged by.

    Args:
        names: of tasks, groups or tags, or paths of YAML files.
        num_fewshot: examples before each question; None takes each task's own.
        apply_chat_template: put questions as the model's chat template has them.

    Raises:
        MissingDependencyError: lm-evaluation-harness is not installed.
        EvaluationError: there is no such task, or its data cannot be had.
    """

    def __init__(
        self, names: Sequence[str], *, num_fewshot: int | None = None, apply_chat_template: bool = False
    ) -> None:
        """Load the tasks' settings and data."""
        require_harness()
        # Optional, and importing it takes seconds.
        from lm_eval.tasks import TaskManager  # noqa: PLC0415

        self._apply_chat_template = apply_chat_template
        missing = [name for name in names if name.endswith((".yaml", ".yml")) and not Path(name).is_file()]
        if missing:
            raise EvaluationError(f"There is no file {missing[0]} to read a task from.")
        are_files = all(Path(name).is_file() for name in names)
        manager = TaskManager(include_defaults=not are_files)  # reading the settings of all tasks takes seconds, too
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            for kind, found in _load(manager, name).items():
                loaded[kind].update(found)
        self._loaded = loaded
        for task in self.tasks.values():
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    @property
    def tasks(self) -> dict[str, Any]:
        """The single tasks by name, groups resolved."""
        tasks: dict[str, Any] = self._loaded["tasks"]
        return tasks

    def metrics(self, task: str) -> dict[str, bool]:
        """Names of a task's metrics, and whether greater is better."""
        directions = self.tasks[task].higher_is_better()
        return {name: bool(directions.get(name, True)) for name in self.tasks[task].aggregation()}

    def tokens_per_example(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Tokens passed forward per example, on average over the first hundred of each task."""
        tokens = examples = 0.0
        for task in self.tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            with redirect_stderr(io.StringIO()):
                task.build_all_requests(limit=COST_EXAMPLES, rank=0, world_size=1)
            examples += len({instance.doc_id for instance in task.instances})
            tokens += sum(_num_tokens(tokenizer, instance.args) for instance in task.instances)
        return tokens / examples

    def score(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        limit: int | None,
        show_progress: bool = False,
    ) -> list[TaskScore]:
        """Judge a model by every metric of every task.

        Args:
            model: causal language model with ``generate``.
            tokenizer: of the model.
            batch_size: requests at a time.
            limit: examples of each task at most; None for all.
            show_progress: show the harness's progress bars.

        Raises:
            ArithmeticError: a figure is not finite.
        """
        from lm_eval.evaluator import evaluate  # noqa: PLC0415
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

        was_training = model.training
        with nullcontext() if show_progress else redirect_stderr(io.StringIO()):
            for task in self.tasks.values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)  # anew, so that every model gets the same examples
            try:
                output = evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    self._loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    apply_chat_template=self._apply_chat_template,
                )
            finally:
                model.train(was_training)
        return [*self._task_scores(output["samples"]), *self._group_scores(output["results"])]

    def _task_scores(self, samples: dict[str, list[dict[str, Any]]]) -> list[TaskScore]:
        scores = []
        for name, task in self.tasks.items():
            for metric, is_greater_better in self.metrics(name).items():
                first = samples[name][0]["filter"]
                items = [sample[metric] for sample in samples[name] if sample["filter"] == first and metric in sample]
                if not items:
                    continue
                score = _score(task.aggregation()[metric], items)
                scores.append(TaskScore(name, ObjectiveInfo(f"{name} {metric}", is_greater_better), score))
        return scores

    def _group_scores(self, results: dict[str, dict[str, Any]]) -> list[TaskScore]:
        """What the harness makes of groups; it has no values of single examples."""
        scores = []
        for name in self._loaded["groups"]:
            for key, value in results.get(name, {}).items():
                metric, _, _ = key.partition(",")
                if "," in key and not metric.endswith("_stderr") and isinstance(value, int | float):
                    scores.append(TaskScore(name, ObjectiveInfo(f"{name} {metric}"), Score(float(value))))
        return scores


class TaskObjective:
    """One metric of one task as an :class:`~peft_autoqra.evaluation.objective.Objective`.

    The task brings its own data: of the held-out data only the number of examples counts.

    Args:
        task: name, or path of a YAML file.
        metric: of the task; None takes its first.

    Raises:
        MissingDependencyError: lm-evaluation-harness is not installed.
        EvaluationError: no such task or metric, or a group of several tasks.
    """

    def __init__(self, task: str, metric: str | None = None) -> None:
        """Load the task."""
        place = str(Path(task).resolve()) if Path(task).is_file() else task  # workers may run in other folders
        self._names = (place, metric)
        self._tasks = HarnessTasks([task])
        if len(self._tasks.tasks) != 1:
            raise EvaluationError(f"{task!r} stands for {len(self._tasks.tasks)} tasks; name one of them.")
        (name,) = self._tasks.tasks
        metrics = self._tasks.metrics(name)
        metric = next(iter(metrics)) if metric is None else metric
        if metric not in metrics:
            raise EvaluationError(f"The task {name!r} has no metric {metric!r}; it has {', '.join(metrics)}.")
        self.info = ObjectiveInfo(f"{name} {metric}", metrics[metric])
        settings = json.dumps(self._tasks.tasks[name].dump_config(), sort_keys=True, default=str)
        self.identity = f"{PREFIX}{name} {metric} {hashlib.sha256(settings.encode()).hexdigest()[:16]}"

    def __reduce__(self) -> tuple[Any, ...]:
        """A loaded task holds functions that cannot be pickled; another process loads it again."""
        return TaskObjective, self._names

    def check(self, examples: Dataset) -> None:
        """Any data will do."""

    def tokens_per_example(self, data: HeldOutExamples) -> float:
        """See :class:`~peft_autoqra.evaluation.objective.Objective`."""
        return self._tasks.tokens_per_example(data.processing_class)

    def score(self, model: nn.Module, data: HeldOutExamples, num_examples: int) -> Score:
        """See :class:`~peft_autoqra.evaluation.objective.Objective`."""
        scores = self._tasks.score(model, data.processing_class, batch_size=data.batch_size, limit=num_examples)
        return next(found.score for found in scores if found.info.name == self.info.name)


def require_harness() -> None:
    """Fail where lm-evaluation-harness is missing.

    Raises:
        MissingDependencyError: it is.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "Tasks need lm-evaluation-harness, which is not installed: pip install 'peft-autoqra[lm-eval]'"
        )


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])
    except KeyError as error:
        raise EvaluationError(
            f"There is no task {name!r}: no such YAML file, and none of lm-evaluation-harness's names; "
            "`lm_eval ls tasks` lists them."
        ) from error
    except Exception as error:  # of the task's own code, or of its data set
        reason = str(error).strip().splitlines() or [""]
        raise EvaluationError(
            f"The task {name!r} cannot be loaded ({type(error).__name__}: {reason[0]}). Its data comes from the hub "
            "unless its YAML file names local files."
        ) from error
    return loaded


def _score(aggregate: Callable[[list[Any]], float], items: list[Any]) -> Score:
    values = example_values(lambda chosen: float(aggregate([items[i] for i in chosen])), len(items))
    return Score(sum(values) / len(values), values)


def _num_tokens(tokenizer: PreTrainedTokenizerBase, arguments: tuple[Any, ...]) -> float:
    """Of one request: a context with what follows it, or with settings of what is to be generated."""
    text = "".join(part for part in arguments if isinstance(part, str))
    generated = 0.0
    for part in arguments:
        if isinstance(part, dict):
            generated = float(part.get("max_gen_toks") or part.get("max_new_tokens") or DEFAULT_GENERATED)
    return len(tokenizer(text)["input_ids"]) + GENERATED_TOKEN * generated
