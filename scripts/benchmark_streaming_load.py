"""Peak memory of loading a checkpoint and quantizing it in place, against quantizing it while it is read.

Each load runs in a process of its own and prints what it took beyond the imports. A thread samples
/proc/self/status: weights that are read as they are stay memory-mapped and count as RssFile, converted ones are
anonymous memory (RssAnon). The total of both is compared; ru_maxrss, the kernel's own peak, is printed beside it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig

METHODS = ("load, then quantize in place", "quantize while loading", "reload the quantized checkpoint")
MEGABYTE = 1e6
FIELDS = ("RssAnon", "RssFile", "VmRSS")


class MemoryPeaks(threading.Thread):
    """Highest values of this process's memory, sampled every 2 milliseconds, in bytes beyond those at the start."""

    def __init__(self) -> None:
        """Note where things stand."""
        super().__init__(daemon=True)
        self.start_bytes = read_status()
        self.start_max_rss_bytes = max_rss_bytes()
        self.peak_bytes = dict(self.start_bytes)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._stopped.wait(0.002):
            self._sample()

    def _sample(self) -> None:
        now = read_status()
        self.peak_bytes = {name: max(value, now[name]) for name, value in self.peak_bytes.items()}

    def stop(self) -> dict[str, float]:
        """The peaks in megabytes."""
        self._stopped.set()
        self.join()
        self._sample()
        peaks = {f"{n}_mb": round((self.peak_bytes[n] - self.start_bytes[n]) / MEGABYTE, 1) for n in FIELDS}
        return peaks | {"ru_maxrss_mb": round((max_rss_bytes() - self.start_max_rss_bytes) / MEGABYTE, 1)}


def read_status() -> dict[str, int]:
    """Bytes of each field now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(line.split()[1]) * 1024 for line in lines for name in FIELDS if line.startswith(f"{name}:")}


def max_rss_bytes() -> int:
    """The kernel's peak of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_checkpoint(folder: Path, num_layers: int) -> None:
    """Write a random bfloat16 Llama in shards of 100 MB."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")


def load(method: str, folder: Path, dtype: torch.dtype, bits: int) -> torch.nn.Module:
    """The quantized model, by one of the methods."""
    if method == METHODS[0]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return get_peft_model(model, AutoQRAConfig(bits=bits, r=1, task_type="CAUSAL_LM")).unload()
    if method == METHODS[1]:
        config = AutoQRAQuantConfig(bits=bits)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    return AutoModelForCausalLM.from_pretrained(folder.parent / f"quantized-{dtype}", dtype=dtype)


def measure(method: str, folder: Path, dtype: torch.dtype, bits: int) -> dict[str, Any]:
    """Load once and report peaks, seconds and a hash of the logits."""
    torch.set_num_threads(1)
    peaks = MemoryPeaks()
    peaks.start()
    start = time.perf_counter()
    model = load(method, folder, dtype, bits)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = peaks.stop() | {"seconds": round(seconds, 1)}
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(64).view(2, 32) * 7).logits.float()
    if method == METHODS[1]:
        model.save_pretrained(folder.parent / f"quantized-{dtype}")
    return result | {"logits_sha256": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}


def measure_in_a_new_process(method: str, folder: Path, dtype: str, bits: int) -> dict[str, Any]:
    """The same, in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", method, "--folder", str(folder)]
    command += ["--dtype", dtype, "--bits", str(bits)]
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(completed.stdout.splitlines()[-1])


def compare(folder: Path, dtype: str, bits: int) -> dict[str, Any]:
    """All methods in one dtype.

    Raises:
        SystemExit: logits differ, or streaming takes half the memory or more.
    """
    results = {method: measure_in_a_new_process(method, folder, dtype, bits) for method in METHODS}
    for method, result in results.items():
        print(f"{dtype:9} {method:32}", *(f"{k}={v}" for k, v in result.items() if k != "logits_sha256"), flush=True)
    in_place, streaming = (results[method]["VmRSS_mb"] for method in METHODS[:2])
    ratio = streaming / in_place
    equal = len({result["logits_sha256"] for result in results.values()}) == 1
    print(f"{dtype:9} peak of streaming / in place: {ratio:.3f}; logits bit-equal: {equal}", flush=True)
    if not equal or ratio >= 0.5:
        raise SystemExit("FAILED: logits must be bit-equal and the peak of streaming below half.")
    return {"results": results, "peak_ratio": round(ratio, 3), "logits_bit_equal": equal}


def main() -> None:
    """Run the comparison, or with ``--measure`` one load of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/streaming-load.json"))
    parser.add_argument("--quick", action="store_true", help="bfloat16 only; writes no file")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--num_layers", type=int, default=16, help="16 make 214 million parameters")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtypes = ("bfloat16",) if args.quick else ("bfloat16", "float32")
    if args.make:
        make_checkpoint(args.folder, args.make)
        return
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder, getattr(torch, args.dtype), args.bits)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        command = [sys.executable, __file__, "--make", str(args.num_layers), "--folder", str(folder)]
        subprocess.run(command, check=True)  # a process of its own: children inherit the peak of ru_maxrss
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        num_parameters = index["metadata"]["total_size"] // 2
        shards = len(list(folder.glob("*.safetensors")))
        print(f"{num_parameters / 1e6:.0f}M parameters, bfloat16, {shards} shards, to {args.bits} bits", flush=True)
        comparisons = {dtype: compare(folder, dtype, args.bits) for dtype in dtypes}
    content = {
        "num_parameters": num_parameters,
        "num_shards": shards,
        "bits": args.bits,
        "device": f"CPU, {platform.machine()}, 1 thread",
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "comparisons": comparisons,
    }
    if not args.quick:  # the results that are kept are whole ones
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
