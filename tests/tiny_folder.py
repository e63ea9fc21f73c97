"""A folder with a tiny model, its tokenizer and text files: what a command line can be pointed at."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from tests.tiny_data import word_tokenizer

SEARCH_FLAGS = [
    "--memory_budget",
    "qlora-4bit-r8",
    "--rank_choices",
    "0",
    "2",
    "4",
    "--bit_choices",
    "2",
    "4",
    "8",
    "--num_calibration_sequences",
    "4",
    "--num_eval_sequences",
    "4",
    "--max_cost",
    "1000",
    "--max_trials",
    "7",
    "--num_seeds",
    "2",
]
RECIPE_FLAGS = [
    "--max_length",
    "16",
    "--per_device_train_batch_size",
    "2",
    "--per_device_eval_batch_size",
    "4",
    "--learning_rate",
    "1e-3",
    "--max_steps",
    "2",
    "--bf16",
    "false",
    "--gradient_checkpointing",
    "false",
    "--use_cpu",
    "--report_to",
    "none",
    "--disable_tqdm",
    "true",
]


@dataclass(frozen=True)
class TinyFolder:
    """Paths of the model folder and of the data folder with ``train.jsonl`` and ``test.jsonl``."""

    model: Path
    data: Path

    @property
    def flags(self) -> list[str]:
        """Model, data and recipe, without an output directory."""
        files = ["--train_file", str(self.data / "train.jsonl"), "--eval_file", str(self.data / "test.jsonl")]
        return ["--model_name_or_path", str(self.model), *files, *RECIPE_FLAGS]


def make_tiny_folder(directory: Path, model: PreTrainedModel) -> TinyFolder:
    """Write model, tokenizer and data."""
    folder = TinyFolder(directory / "model", directory / "data")
    model.save_pretrained(folder.model)
    word_tokenizer().save_pretrained(folder.model)
    folder.data.mkdir()
    rng = random.Random(0)
    for name, num_rows in (("train", 12), ("test", 6)):
        rows = [{"text": " ".join(f"w{rng.randrange(30)}" for _ in range(14))} for _ in range(num_rows)]
        (folder.data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
