"""The main job on a real model and real text: search at two budgets, fine-tune, compare with LoRA and QLoRA.

Run by ``make demo``. Model (SmolLM2-135M-Instruct) and data (IMDB and Rotten Tomatoes reviews) come from registry
packages; ``--model_name_or_path`` takes any hub id or folder instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from peft_autoqra import (
    AutoQRAConfig,
    AutoQRASearchConfig,
    AutoQRASearcher,
    BitRankPlan,
    MemoryModel,
    QuantizerSettings,
    uniform_plan,
)
from peft_autoqra.evaluation.held_out import held_out_loss
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_measurement import measure_memory
from peft_autoqra.report import write_report

BUDGETS = {"100%": "qlora-4bit-r16", "75%": "0.75*qlora-4bit-r16"}
MAX_TOKENS = 96
ANSWERS = (" negative", " positive")


@dataclass(frozen=True)
class Reviews:
    """Long reviews as text; short ones as a question with an answer, whose accuracy is exact."""

    text: Dataset
    questions: Dataset

    def mixed(self, seed: int) -> Dataset:
        """Both as plain text, shuffled."""
        answered = [row["prompt"] + row["completion"] for row in self.questions]
        return concatenate_datasets(
            [self.text.select_columns(["text"]), Dataset.from_dict({"text": answered})]
        ).shuffle(seed=seed)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    loss: float
    accuracy: float
    memory: MemoryEstimate
    search_seconds: float
    training_seconds: float


def main() -> None:
    """Run all of it and print the table."""
    options = parse_options()
    start = time.perf_counter()
    assets = prepare_assets()
    model_id = options.model_name_or_path or assets["model"]
    splits = {split: load_reviews(assets, split) for split in ("train", "dev", "test")}
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    rows = [
        fine_tune("LoRA r=16, 16 bits", model_id, None, splits, tokenizer, options),
        fine_tune("QLoRA NF4 r=16", model_id, qlora_plan(model_id), splits, tokenizer, options),
    ]
    for label, budget in BUDGETS.items():
        plan, seconds = search(model_id, budget, label, splits, tokenizer, options)
        name = f"AutoQRA, {label} of QLoRA's memory"
        rows.append(fine_tune(name, model_id, plan, splits, tokenizer, options, seconds))
    write_table(rows, options.output_dir)
    print(f"\nEverything took {(time.perf_counter() - start) / 60:.1f} minutes; see {options.output_dir}/.")


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="hub id or folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-out"))
    parser.add_argument("--max_steps", type=int, default=50, help="training steps of every fine-tune")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def prepare_assets() -> dict[str, str]:
    """Folders of the model and the data; made where missing."""
    script = Path(__file__).with_name("prepare_demo_assets.py")
    output = subprocess.run([sys.executable, script, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
    folders: dict[str, str] = json.loads(output)
    return folders


def load_reviews(assets: dict[str, str], split: str) -> Reviews:
    """A prefix of a split; the files are in random order."""
    size = {"train": 2000, "dev": 100, "test": 400}[split]
    text = Dataset.from_json(f"{assets['imdb']}/{split}.jsonl").select(range(size if split != "test" else 64))
    return Reviews(text, Dataset.from_json(f"{assets['rotten_tomatoes']}/{split}.jsonl").select(range(size)))


def recipe(options: argparse.Namespace, output_dir: Path) -> SFTConfig:
    """The same for every method."""
    return SFTConfig(
        output_dir=str(output_dir),
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        max_length=MAX_TOKENS,
        bf16=True,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


def load_base(model_id: str) -> torch.nn.Module:
    """The 16-bit model."""
    return AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.bfloat16)


def qlora_plan(model_id: str) -> BitRankPlan:
    """What QLoRA does: NF4 with double quantization, rank 16 and a zero start everywhere."""
    return uniform_plan(load_base(model_id), 4, 16, quantizer=QuantizerSettings(backend="bitsandbytes"))


def search(
    model_id: str,
    budget: str,
    label: str,
    splits: dict[str, Reviews],
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> tuple[BitRankPlan, float]:
    """Search at a budget; the second search takes the calibration of the first from the cache."""
    output_dir = options.output_dir / f"search-{label.rstrip('%')}"
    print(f"\nSearching a plan at {label} of QLoRA's training memory", flush=True)
    searcher = AutoQRASearcher(
        load_base(model_id),
        train_dataset=splits["train"].mixed(options.seed),
        eval_dataset=splits["dev"].mixed(options.seed),
        processing_class=tokenizer,
        args=recipe(options, output_dir),
        search_config=AutoQRASearchConfig(
            memory_budget=budget,
            num_calibration_sequences=48,
            num_eval_sequences=48,
            population_size=6,
            num_generations=2,
            num_promoted=2,
            num_trust_region_trials=2,
            short_steps=6,
            final_steps=16,
            num_finalists=1,
            cache_dir=str(options.output_dir / "calibration"),
            output_dir=str(output_dir),
            seed=options.seed,
        ),
    )
    result = searcher.run()
    write_report(output_dir)
    return result.plan, result.seconds


def fine_tune(
    name: str,
    model_id: str,
    plan: BitRankPlan | None,
    splits: dict[str, Reviews],
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    search_seconds: float = 0.0,
) -> Row:
    """Fine-tune one configuration through SFTTrainer and measure it on the test split."""
    print(f"\nFine-tuning: {name}", flush=True)
    base = load_base(model_id)
    modules = list(MemoryModel.from_model(base).modules)
    folder = options.output_dir / "".join(c if c.isalnum() else "-" for c in name)
    if plan is None:
        peft_config = LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    else:
        peft_config = AutoQRAConfig(plan=plan, lora_alpha=8, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=base,
        args=recipe(options, folder),
        train_dataset=splits["train"].mixed(options.seed),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    memory = with_gradients(measure_memory(trainer.model, modules, trainer.optimizer))
    trainer.save_model(str(folder))
    loss = held_out_loss(trainer.model, text_batches(splits["test"].text["text"], tokenizer)).mean
    accuracy = answer_accuracy(trainer.model, splits["test"].questions, tokenizer)
    row = Row(name, loss, accuracy, memory, search_seconds, seconds)
    print(f"{name}: held-out loss {loss:.4f}, accuracy {accuracy:.3f}, training {seconds:.0f} s", flush=True)
    return row


def with_gradients(measured: MemoryEstimate) -> MemoryEstimate:
    """The trainer clears gradients after its last step; each is as large as its adapter."""
    return MemoryEstimate(**{**measured.to_dict(), "gradient_bytes": measured.adapter_bytes})


def text_batches(texts: list[str], tokenizer: PreTrainedTokenizerBase, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Truncated, padded and labelled batches."""
    batches = []
    for first in range(0, len(texts), size):
        batch = tokenizer(
            texts[first : first + size], truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append({**batch, "labels": labels})
    return batches


@torch.no_grad()
def answer_accuracy(model: PeftModel, questions: Dataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of questions whose right answer gets the higher probability."""
    model.eval()
    answer_ids = torch.tensor([tokenizer(answer).input_ids[0] for answer in ANSWERS])
    correct = 0
    for first in range(0, len(questions), 16):
        rows = questions.select(range(first, min(first + 16, len(questions))))
        batch = tokenizer(rows["prompt"], padding=True, padding_side="right", return_tensors="pt")
        last = batch["attention_mask"].sum(1) - 1
        logits = model(**batch).logits[torch.arange(len(rows)), last]
        predicted = logits[:, answer_ids].argmax(1)
        wanted = torch.tensor([ANSWERS.index(completion) for completion in rows["completion"]])
        correct += int((predicted == wanted).sum())
    return correct / len(questions)


def write_table(rows: list[Row], output_dir: Path) -> None:
    """Print the table as Markdown; keep it and the figures."""
    header = (
        "| method | held-out loss | accuracy | weights MB | scales MB | untouched MB | adapter MB | gradients + optimizer "
        "MB | total MB | search s | training s |"
    )
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    for row in rows:
        memory = row.memory
        parts = (memory.weight_bytes, memory.metadata_bytes, memory.untouched_bytes, memory.adapter_bytes)
        parts += (memory.gradient_bytes + memory.optimizer_bytes, memory.total_bytes)
        sizes = " | ".join(f"{size / 1e6:.1f}" for size in parts)
        seconds = f"{row.search_seconds:.0f} | {row.training_seconds:.0f}"
        lines.append(f"| {row.name} | {row.loss:.3f} | {row.accuracy:.3f} | {sizes} | {seconds} |")
    table = "\n".join(lines)
    print("\n" + table)
    (output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    (output_dir / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
