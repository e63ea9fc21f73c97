"""Judging a model by a metric of the `evaluate` library, on labels that it chooses or texts that it writes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
from datasets import Dataset, Features, Value
from evaluate import EvaluationModule
from torch import nn

from peft_autoqra.errors import EvaluationError
from peft_autoqra.evaluation.answers import generated_texts, likeliest_choices
from peft_autoqra.evaluation.builtin_metrics import BUILTIN_METRICS
from peft_autoqra.evaluation.completions import Completion, Tokenizing, read_completions, with_choices
from peft_autoqra.evaluation.jackknife import example_values
from peft_autoqra.evaluation.objective import GENERATED_TOKEN, MAX_NEW_TOKENS, HeldOutExamples, Score
from peft_autoqra.objective_info import ObjectiveInfo

COST_SAMPLE = 1000

_LESS_IS_BETTER = frozenset({"wer", "cer", "ter", "mse", "mae", "perplexity", "brier_score"})


class MetricObjective:
    """A metric of the `evaluate` library, from its hub, from a script, or of a class of your own.

    What its ``predictions`` are declared to be decides what a model does: for texts it continues each prompt,
    greedily; for numbers it chooses the likeliest of the example's choices, or of all completions of the data, and
    predictions and references are their positions. Completions are the references. Pairs of models are compared by the
    jackknife, so that a metric need be no mean over the examples.

    Args:
        metric: the loaded metric.
        key: which of its figures; None where there is one, or one of the metric's name.
        greater_is_better: None takes the metric's own attribute of that name, else knows word error rates, losses and
            the like by their names.
        max_new_tokens: of a text.
        name: as messages call it; the metric's own by default.
        compute_kwargs: of the metric's ``compute``, such as ``{"average": "macro"}``.

    Raises:
        EvaluationError: predictions that are neither texts nor numbers.
    """

    def __init__(
        self,
        metric: EvaluationModule,
        *,
        key: str | None = None,
        greater_is_better: bool | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        name: str | None = None,
        compute_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Read what the metric declares."""
        self.metric, self.key, self.max_new_tokens = metric, key, max_new_tokens
        self._made_from: tuple[str, str | None, int] | None = None
        self.compute_kwargs = dict(compute_kwargs or {})
        features = _features(metric)
        self.writes_text = _is_text(metric, features["predictions"])
        self._many_references = not isinstance(features["references"], Value)
        shown = name or (f"{metric.name}:{key}" if key else metric.name)
        if greater_is_better is None:
            greater_is_better = getattr(metric, "greater_is_better", _is_greater_better(key or metric.name))
        self.info = ObjectiveInfo(shown, bool(greater_is_better))
        settings = [f"max_new_tokens={max_new_tokens}"] if self.writes_text else []
        self.identity = " ".join(
            [shown, _source_hash(metric), *settings, *(f"{k}={v}" for k, v in self.compute_kwargs.items())]
        )

    @classmethod
    def named(cls, name: str, key: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> MetricObjective:
        """Of a metric that comes with this package, a script, or a name on the hub.

        Raises:
            EvaluationError: there is none, or what is there is no metric.
        """
        metric = BUILTIN_METRICS[name](keep_in_memory=True) if name in BUILTIN_METRICS else _load(name)
        objective = cls(metric, key=key, max_new_tokens=max_new_tokens)
        objective._made_from = (_place(name), key, max_new_tokens)
        return objective

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A script's class is not known to another process, which loads it again."""
        return super().__reduce_ex__(protocol) if self._made_from is None else (self.named, self._made_from)

    def __getstate__(self) -> dict[str, Any]:
        """Without the metric's locks, which are this process's: it keeps them when it has released them."""
        metric = self.metric  # a copy would not do, whose methods are bound to the original
        metric.filelock = metric.filelocks = metric.rendez_vous_lock = None
        return vars(self)

    def check(self, examples: Dataset) -> None:
        """See :class:`~peft_autoqra.evaluation.objective.Objective`; the metric is tried on perfect predictions."""
        right = [self._right(one) for one in self._completions(examples)]
        try:
            self._compute(right, right, range(len(right)))
        except EvaluationError:
            raise
        except Exception as error:  # of the metric's own code
            raise EvaluationError(
                f"The metric {self.info.name!r} fails where predictions equal references: {type(error).__name__}: "
                f"{error}"
            ) from error

    def tokens_per_example(self, data: HeldOutExamples) -> float:
        """See :class:`~peft_autoqra.evaluation.objective.Objective`; texts are taken to be as long as they may be."""
        completions = self._completions(data.examples)[:COST_SAMPLE]
        tokenizing = Tokenizing(data.processing_class, data.max_length)
        if self.writes_text:
            lengths = [len(tokenizing.prompt(one, self.max_new_tokens)) for one in completions]
            return sum(lengths) / len(lengths) + GENERATED_TOKEN * self.max_new_tokens
        pairs = [tokenizing.pair(one, choice) for one in completions for choice in one.choices]
        return sum(len(prompt) + len(answer) for prompt, answer in pairs) / len(completions)

    def score(self, model: nn.Module, data: HeldOutExamples, num_examples: int) -> Score:
        """See :class:`~peft_autoqra.evaluation.objective.Objective`."""
        completions = self._completions(data.examples)[:num_examples]
        tokenizing = Tokenizing(data.processing_class, data.max_length)
        predictions: Sequence[Any]
        if self.writes_text:
            predictions = generated_texts(model, completions, tokenizing, data.batch_size, self.max_new_tokens)
        else:
            predictions = likeliest_choices(model, completions, tokenizing, data.batch_size)
        references = [self._right(one) for one in completions]
        values = example_values(lambda chosen: self._compute(predictions, references, chosen), len(completions))
        return Score(sum(values) / len(values), values)

    def _completions(self, examples: Dataset) -> list[Completion]:
        completions = read_completions(examples)
        return completions if self.writes_text else with_choices(completions)

    def _right(self, completion: Completion) -> str | int:
        return completion.answer.strip() if self.writes_text else completion.label

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any], chosen: Sequence[int]) -> float:
        figures = self.metric.compute(
            predictions=[predictions[i] for i in chosen],
            references=[[references[i]] if self._many_references else references[i] for i in chosen],
            **self.compute_kwargs,
        )
        return self._figure(figures)

    def _figure(self, figures: Mapping[str, Any]) -> float:
        key = self.key or (next(iter(figures)) if len(figures) == 1 else self.metric.name)
        value = figures.get(key)
        if value is None or not (isinstance(value, int | float) or getattr(value, "ndim", None) == 0):
            raise EvaluationError(
                f"The metric {self.metric.name!r} gives {sorted(figures)}, and {key!r} of them is no number; name "
                f"one, such as {self.metric.name}:{next(iter(figures), 'KEY')}."
            )
        return float(value)


def _load(name: str) -> EvaluationModule:
    try:
        return evaluate.load(name, keep_in_memory=True)
    except FileNotFoundError as error:
        raise EvaluationError(
            f"There is no metric {name!r}: no such script here, and not in the cache or on the hub (perhaps out "
            "of reach). Give the path of a script, such as ./my_metric.py, or one of accuracy, exact_match."
        ) from error
    except Exception as error:  # a script raises what it likes
        raise EvaluationError(f"The metric {name!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _place(name: str) -> str:
    """A script as it is found from other folders, where workers may run; other names as they are."""
    path = Path(name)
    is_script = path.is_file() or path.joinpath(f"{path.name}.py").is_file()
    return str(path.resolve()) if is_script and name not in BUILTIN_METRICS else name


def _features(metric: EvaluationModule) -> Features:
    """Declared inputs; of several forms the first."""
    features = metric.features
    features = features[0] if isinstance(features, list) else features
    if set(features) != {"predictions", "references"}:
        raise EvaluationError(
            f"The metric {metric.name!r} takes {sorted(features)}; one that takes predictions and references is "
            "needed."
        )
    return features


def _is_text(metric: EvaluationModule, feature: object) -> bool:
    if isinstance(feature, Value):
        return str(feature.dtype) in ("string", "large_string")
    raise EvaluationError(f"The metric {metric.name!r} takes {feature!r} for predictions; texts or labels are needed.")


def _source_hash(metric: EvaluationModule) -> str:
    """Of the code that computes it; of a class without a file its name must do."""
    try:
        source = inspect.getsource(type(metric))
    except (OSError, TypeError):
        source = type(metric).__qualname__
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _is_greater_better(name: str) -> bool:
    return not name.endswith("loss") and name not in _LESS_IS_BETTER
