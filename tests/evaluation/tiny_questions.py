"""Prompts with completions, and scripts of metrics."""

from __future__ import annotations

import random
from pathlib import Path

from datasets import Dataset

F1_SCRIPT = """
import datasets
import evaluate
from sklearn.metrics import f1_score


class MacroF1(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"f1": f1_score(references, predictions, average="macro", zero_division=0.0), "count": "many"}
"""
DISTANCE_SCRIPT = """
import datasets
import evaluate


class Distance(evaluate.Metric):
    greater_is_better = False

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        pairs = zip(predictions, references)
        return {"distance": sum(abs(len(p.split()) - len(r[0].split())) for p, r in pairs) / len(predictions)}
"""


def questions(num: int = 12, seed: int = 0) -> Dataset:
    """Each is answered by one of three completions of different lengths."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(f"w{rng.randrange(30)}" for _ in range(rng.randrange(2, 6))),
            "completion": rng.choice([" w7", " w7 w8", " w40"]),
        }
        for _ in range(num)
    ]
    return Dataset.from_list(rows)


def write_script(directory: Path, name: str, text: str) -> str:
    path = directory / f"{name}.py"
    path.write_text(text)
    return str(path)
