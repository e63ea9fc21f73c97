"""The main job on a real model and real text: search at two budgets, fine-tune, compare with LoRA and QLoRA.

Run by ``make demo``. Model (SmolLM2-135M-Instruct) and data (IMDB and Rotten Tomatoes reviews) come from registry
packages; ``--model_name_or_path`` takes any hub id or folder instead.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.recipe import AdapterArguments
from peft_autoqra.report import write_report
from peft_autoqra.training import FineTune, FineTuneInputs

BUDGETS = {"100%": "qlora-4bit-r16", "75%": "0.75*qlora-4bit-r16"}
MAX_TOKENS = 64
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
    job = Job(model_id, splits, tokenizer, options)
    rows = [
        job.fine_tune("LoRA r=16, 16 bits", AdapterArguments(bits=16, r=16)),
        job.fine_tune("QLoRA NF4 r=16", AdapterArguments(bits=4, r=16, quant_backend="bitsandbytes")),
    ]
    for label, budget in BUDGETS.items():
        plan, seconds = job.search(budget, label)
        rows.append(job.fine_tune(f"AutoQRA at {label} of QLoRA's memory", AdapterArguments(plan=plan), seconds))
    write_table(rows, options.output_dir)
    print(f"\nEverything took {(time.perf_counter() - start) / 60:.1f} minutes; see {options.output_dir}/.")


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="hub id or folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-out"))
    parser.add_argument("--max_steps", type=int, default=120, help="training steps of every fine-tune")
    parser.add_argument("--max_cost", type=float, default=1.0, help="of each search, in full fine-tunes")
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
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


@dataclass(frozen=True)
class Job:
    """One model, data and recipe, for every method the same."""

    model_id: str
    splits: dict[str, Reviews]
    tokenizer: PreTrainedTokenizerBase
    options: argparse.Namespace

    def load_base(self) -> PreTrainedModel:
        """The 16-bit model."""
        return AutoModelForCausalLM.from_pretrained(self.model_id, dtype=torch.bfloat16)

    def search(self, budget: str, label: str) -> tuple[str, float]:
        """Folder of the plan found at a budget, and seconds; calibration is shared through the cache."""
        options = self.options
        output_dir = options.output_dir / f"search-{label.rstrip('%')}"
        print(f"\nSearching a plan at {label} of QLoRA's training memory", flush=True)
        searcher = AutoQRASearcher(
            self.load_base(),
            train_dataset=self.splits["train"].mixed(options.seed),
            eval_dataset=self.splits["dev"].mixed(options.seed),
            processing_class=self.tokenizer,
            args=recipe(options, output_dir),
            search_config=AutoQRASearchConfig(
                memory_budget=budget,
                num_calibration_sequences=48,
                num_eval_sequences=32,
                max_cost=options.max_cost,
                cache_dir=str(options.output_dir / "calibration"),
                output_dir=str(output_dir),
                seed=options.seed,
            ),
        )
        result = searcher.run()
        print(f"report: {write_report(output_dir)}", flush=True)
        return str(output_dir / "plan"), result.seconds

    def fine_tune(self, name: str, adapter: AdapterArguments, search_seconds: float = 0.0) -> Row:
        """Train one configuration through SFTTrainer and measure it on the test split.

        Raises:
            SystemExit: the real tensors do not take the estimated bytes.
        """
        print(f"\nFine-tuning: {name}", flush=True)
        folder = self.options.output_dir / "-".join(re.findall(r"[A-Za-z0-9]+", name))
        test = self.splits["test"]
        tuning = FineTune(
            FineTuneInputs(
                model=self.load_base(),
                processing_class=self.tokenizer,
                train_dataset=self.splits["train"].mixed(self.options.seed),
                eval_dataset=test.text.select_columns(["text"]),
                args=recipe(self.options, folder),
                adapter=adapter,
            )
        )
        result = tuning.run()
        if result.measured is None or result.measured != result.estimated:
            raise SystemExit(f"{name}: estimated {result.estimated}, measured {result.measured}")
        accuracy = answer_accuracy(tuning.trainer.model, test.questions, self.tokenizer)
        row = Row(name, result.eval_loss, accuracy, result.measured, search_seconds, result.train_seconds)
        print(f"{name}: held-out loss {row.loss:.4f}, accuracy {accuracy:.3f}", flush=True)
        return row


@torch.no_grad()
def answer_accuracy(model: PeftModel, questions: Dataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of questions whose right answer gets the higher probability."""
    model.eval()
    answer_ids = torch.tensor([tokenizer(answer).input_ids[0] for answer in ANSWERS])
    correct = 0
    for first in range(0, len(questions), 16):
        rows = questions.select(range(first, min(first + 16, len(questions))))
        batch = tokenizer(list(rows["prompt"]), padding=True, padding_side="left", return_tensors="pt").to(
            model.device
        )
        logits = model(**batch, logits_to_keep=1).logits[:, -1].cpu()
        predicted = logits[:, answer_ids].argmax(1)
        wanted = torch.tensor([ANSWERS.index(completion) for completion in rows["completion"]])
        correct += int((predicted == wanted).sum())
    return correct / len(questions)


def write_table(rows: list[Row], output_dir: Path) -> None:
    """Print the table as Markdown; keep it and the figures."""
    header = (
        "| method | held-out loss | accuracy | weights MB | scales MB | untouched MB | adapter MB "
        "| gradients + optimizer MB | total MB | search s | training s |"
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
