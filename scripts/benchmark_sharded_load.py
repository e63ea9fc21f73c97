"""Peak memory of each of two processes that load, quantize and train one model together, on the CPU over gloo.

Each way runs in two processes of its own. A thread of each samples VmRSS in /proc/self/status; what it took beyond the
imports is printed for the time until the trainer stands ("load") and for one training step after that ("train").

    python scripts/benchmark_sharded_load.py --output benchmarks/results/sharded-load.json

accelerate turns FSDP on for GPUs only, so that for FSDP2 these processes pass for ones with a GPU each. On GPUs, the
parts of the model and the adapters lie in the GPU's memory after loading, and not in the machine's as here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from peft_autoqra import AutoQRAQuantConfig, BitRankPlan, uniform_plan
from peft_autoqra.distribution import find_distribution
from peft_autoqra.recipe import AdapterArguments
from peft_autoqra.training import FineTune, FineTuneInputs

WAYS = {
    "DDP, load, then quantize in place": ("ddp", False, False),
    "DDP, quantize while loading": ("ddp", True, False),
    "FSDP2, each process loads, then quantizes in place": ("fsdp2", False, False),
    "FSDP2, each process quantizes while loading": ("fsdp2", True, False),
    "FSDP2, the first process quantizes while loading": ("fsdp2", True, True),
}
"""Strategy, streaming, and whether the first process alone reads."""


class MemoryPeak(threading.Thread):
    """Highest resident memory of this process, sampled every 2 milliseconds, beyond that at the start."""

    def __init__(self) -> None:
        """Note where things stand."""
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = resident_bytes()

    def run(self) -> None:
        """Sample for ever."""
        while not threading.Event().wait(0.002):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def take(self) -> float:
        """The peak in megabytes since this was called last."""
        peak = max(self.peak_bytes, resident_bytes())
        self.peak_bytes = 0
        return round((peak - self.start_bytes) / 1e6, 1)


def resident_bytes() -> int:
    """This process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def make_checkpoint(folder: Path, num_layers: int) -> None:
    """Write a random bfloat16 Llama in shards of 100 MB, and a plan of 4 bits and rank 8 for it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = LlamaConfig(**sizes, num_hidden_layers=num_layers, vocab_size=8192, dtype="bfloat16")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    uniform_plan(model, 4, 8).save_pretrained(folder / "plan")


def tokenizer() -> PreTrainedTokenizerFast:
    """One that SFTTrainer can pad with; the data are tokens already."""
    words = WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")


def pass_for_gpus(first_process_reads: bool) -> None:
    """Ask for FSDP2, and let accelerate grant it on these CPUs."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": str(first_process_reads).lower(),
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def measure(way: str, folder: Path) -> None:
    """Train one step in one way, and let the first process print the peaks of all."""
    strategy, streams, first_process_reads = WAYS[way]
    if strategy == "fsdp2":
        pass_for_gpus(first_process_reads)
    args = SFTConfig(
        output_dir=str(folder / "adapter"), max_steps=1, per_device_train_batch_size=1, max_length=8, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    distribution = find_distribution(args)
    plan = BitRankPlan.from_pretrained(folder / "plan")
    data = Dataset.from_dict({"input_ids": [list(range(8))] * 4})
    memory = MemoryPeak()
    memory.start()
    model = None
    if distribution.is_main_process or not distribution.first_process_reads:
        quantization = {"quantization_config": AutoQRAQuantConfig(plan=plan)} if streams else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **quantization)
    inputs = {"processing_class": tokenizer(), "train_dataset": data, "eval_dataset": data, "args": args}
    finetune = FineTune(FineTuneInputs(model=model, adapter=AdapterArguments(), plan=plan, **inputs))
    del model
    peaks = {"load_mb": memory.take()}
    finetune.trainer.train()
    peaks["train_mb"] = memory.take()
    gathered: list[Any] = [None] * distribution.num_processes
    torch.distributed.all_gather_object(gathered, peaks)
    if distribution.is_main_process:
        print(json.dumps({f"process {rank}": each for rank, each in enumerate(gathered)}))
    torch.distributed.destroy_process_group()


def measure_in_two_processes(way: str, folder: Path) -> dict[str, dict[str, float]]:
    """The same, in fresh interpreters."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, __file__, "--measure", way, "--folder", str(folder)]
    variables = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | variables)
    return json.loads(next(line for line in completed.stdout.splitlines() if line.startswith('{"process')))


def main() -> None:
    """Run the comparison, or with ``--measure`` one process of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--num_layers", type=int, default=16, help="16 make 222 million parameters")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder, args.num_layers)
        num_bytes = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        print(f"{num_bytes / 1e6:.0f} MB in bfloat16, to 4 bits, rank 8", flush=True)
        results = {}
        for way in WAYS:
            results[way] = measure_in_two_processes(way, folder)
            print(f"{way:52}", results[way], flush=True)
    content = {
        "checkpoint_bytes": num_bytes,
        "bits": 4,
        "rank": 8,
        "device": f"CPU, {platform.machine()}, 2 processes of 1 thread",
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "peak_beyond_imports": results,
    }
    if args.output:
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
