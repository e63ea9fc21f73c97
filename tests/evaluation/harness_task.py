"""A task of lm-evaluation-harness made of local files."""

from __future__ import annotations

import json
import random
from pathlib import Path

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {data}
    test: {data}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: right
num_fewshot: {num_fewshot}
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def task_rows() -> list[dict[str, object]]:
    rng = random.Random(0)
    return [
        {
            "question": " ".join(f"w{rng.randrange(30)}" for _ in range(5)),
            "choices": ["w1 w2", "w3"],
            "right": rng.randrange(2),
        }
        for _ in range(12)
    ]


def write_task(directory: Path, name: str = "pick", num_fewshot: int | None = None) -> str:
    """Path of the YAML file."""
    data, path = directory / f"{name}.jsonl", directory / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in task_rows()))
    path.write_text(TASK.format(name=name, data=data, num_fewshot="null" if num_fewshot is None else num_fewshot))
    return str(path)
