"""What all methods share: model, task and recipe."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from benchmarks.finetune.tasks import SplitSizes, Task, load_task
from peft_autoqra.errors import EvaluationError
from peft_autoqra.evaluation.sft import SFTData


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The fine-tune, but for its learning rate and seed.

    Attributes:
        max_steps: optimizer steps.
        batch_size: sequences of a step, and of a forward pass.
        max_length: tokens of a sequence at most.
        learning_rate: of searches; the middle of those that fine-tunes are tried with.
        attn_implementation: as in ``from_pretrained``.
        gradient_checkpointing: as in ``SFTConfig``.
    """

    max_steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False

    def sft_config(self, output_dir: Path, *, learning_rate: float | None = None, seed: int = 0) -> SFTConfig:
        """For TRL: bfloat16, AdamW, a learning rate that falls linearly, the loss over prompt and completion."""
        return SFTConfig(
            output_dir=str(output_dir),
            max_steps=self.max_steps,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            max_length=self.max_length,
            train_sampling_strategy="group_by_length",
            completion_only_loss=False,
            optim="adamw_torch",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=self.gradient_checkpointing,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model on one task with one recipe.

    Attributes:
        model_id: hub id or folder.
        task_name: of :mod:`benchmarks.finetune.tasks`.
        sizes: examples of each split.
        recipe: the fine-tune.
        cache_dir: where plans and calibrations are kept between runs.
    """

    model_id: str
    task_name: str
    sizes: SplitSizes
    recipe: Recipe
    cache_dir: Path

    @property
    def digest(self) -> str:
        """Of everything that changes results; cached plans are kept by it."""
        content = [self.task_name, asdict(self.sizes), asdict(self.recipe), Path(self.model_id).name]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Of what is kept between runs of this setting."""
        return self.cache_dir / f"{Path(self.model_id).name}-{self.task_name}-{self.digest}"

    @cached_property
    def task(self) -> Task:
        """Examples and metric."""
        return load_task(self.task_name, self.sizes)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model."""
        return AutoTokenizer.from_pretrained(self.model_id)

    @cached_property
    def data(self) -> SFTData:
        """Training and development data as SFTTrainer prepares them.

        Raises:
            EvaluationError: a completion begins beyond ``max_length``.
        """
        return self._prepared(self.task.train, self.task.dev)

    @cached_property
    def test_rows(self) -> Dataset:
        """Likewise, the test split: rows of ``input_ids`` and ``completion_mask``.

        Raises:
            EvaluationError: a completion begins beyond ``max_length``.
        """
        return self._prepared(self.task.dev, self.task.test).held_out

    def load_base(self) -> PreTrainedModel:
        """The unquantized model in bfloat16, fresh from its files."""
        return AutoModelForCausalLM.from_pretrained(
            self.model_id, dtype=torch.bfloat16, attn_implementation=self.recipe.attn_implementation
        )

    def _prepared(self, train: Dataset, held_out: Dataset) -> SFTData:
        args = self.recipe.sft_config(self.folder / "sft")
        data = SFTData(self.load_base(), args, train, held_out, self.tokenizer)
        rows = zip(data.held_out["input_ids"], data.held_out["completion_mask"], strict=True)
        num_cut = sum(1 not in mask[: len(ids)] for ids, mask in rows)  # SFTTrainer cuts ids alone (TRL 1.16)
        if num_cut:
            raise EvaluationError(
                f"The completions of {num_cut} held-out examples of {self.task_name} begin beyond max_length="
                f"{self.recipe.max_length} tokens; raise it."
            )
        return data
