"""Metrics that need no hub."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Features, Value
from evaluate import EvaluationModule, Metric, MetricInfo


class Accuracy(Metric):  # type: ignore[misc]
    """Share of the examples whose right choice is the one that the model finds likeliest."""

    def _info(self) -> MetricInfo:
        return _info("Share of right labels.", "int64")

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": _share_equal(predictions, references)}


class ExactMatch(Metric):  # type: ignore[misc]
    """Share of the examples whose completion is what the model writes, white space around it aside."""

    def _info(self) -> MetricInfo:
        return _info("Share of texts that equal their reference.", "string")

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"exact_match": _share_equal(predictions, references)}


BUILTIN_METRICS: dict[str, type[EvaluationModule]] = {"accuracy": Accuracy, "exact_match": ExactMatch}


def _info(description: str, dtype: str) -> MetricInfo:
    features = Features({"predictions": Value(dtype), "references": Value(dtype)})
    return MetricInfo(description=description, citation="", inputs_description="", features=features)


def _share_equal(predictions: Sequence[object], references: Sequence[object]) -> float:
    pairs = list(zip(predictions, references, strict=True))
    return sum(bool(prediction == reference) for prediction, reference in pairs) / len(pairs)
