"""What quantizers and initial adapters lose on a real model before training, and how fast a search switches plans.

Losses are of text that nothing was calibrated on. Ratios and differences are against bitsandbytes in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_autoqra import (
    AutoQRAConfig,
    AutoQRAQuantConfig,
    BitRankPlan,
    LayerPlan,
    QuantizerSettings,
    calibrate_plan,
    uniform_plan,
)
from peft_autoqra.evaluation.held_out import held_out_loss
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.importance.calibration_bank import BankSettings, CalibrationBank, build_calibration_bank
from peft_autoqra.importance.module_fit import FitSettings
from peft_autoqra.target_modules import linear_targets

NF4 = QuantizerSettings(backend="bitsandbytes")
RANK = 16
PACKAGES = ("peft-autoqra", "torch", "transformers", "peft", "bitsandbytes")
Batches = list[dict[str, torch.Tensor]]


def main() -> None:
    """Measure, print, write JSON."""
    options = parse_options()
    assets = json.loads(run_script("prepare_demo_assets.py", "--json"))
    bench = Benchmark(assets["model"], options)
    train = bench.batches(read_text(assets["imdb"], "train")[: options.num_calibration_sequences])
    texts = {
        "reviews": bench.batches(read_text(assets["imdb"], "test")[: options.num_eval_sequences]),
        "code": bench.batches(source_code()[: options.num_eval_sequences]),
    }
    common = {
        "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "settings": {key: str(value) for key, value in vars(options).items()},
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        if "losses" in options.parts:
            losses = bench.losses(train, texts, Path(cache))
            print_losses(losses)
            save(options.output_dir / "smollm2-losses.json", {**common, "losses": losses})
        if "switching" in options.parts:
            switching = bench.switching(train, Path(cache))
            print_switching(switching)
            save(options.output_dir / "smollm2-switching.json", {**common, "switching": switching})


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, unless it is of a quick run: the results that are kept are whole ones."""
    if content["settings"]["quick"] == "True":
        return
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_calibration_sequences", type=int, default=128)
    parser.add_argument("--num_eval_sequences", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=96, help="tokens of a sequence")
    parser.add_argument("--quick", action="store_true", help="3 bits and the native backend only; writes no file")
    parser.add_argument("--parts", nargs="+", choices=("losses", "switching"), default=["losses", "switching"])
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def run_script(name: str, *arguments: str) -> str:
    """Standard output of another script here."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def read_text(folder: str, split: str) -> list[str]:
    """Reviews of a split, which are in random order."""
    return list(Dataset.from_json(f"{folder}/{split}.jsonl")["text"])


def source_code() -> list[str]:
    """Python's own source, far from any review; functions of its standard library's argparse, json and others."""
    modules = (argparse, json, datetime, statistics, inspect, tempfile)
    text = "\n".join(inspect.getsource(module) for module in modules)
    return [text[start : start + 1000] for start in range(2000, len(text), 2500)]


class Benchmark:
    """The model and how it is measured.

    Args:
        model_id: folder of the unquantized model.
        options: command line.
    """

    def __init__(self, model_id: str, options: argparse.Namespace) -> None:
        """Load nothing but the tokenizer."""
        self.model_id, self.options = model_id, options
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_id)

    def load(self, plan: BitRankPlan | None = None) -> torch.nn.Module:
        """The unquantized model, or one with a plan's quantized layers and adapters."""
        config = None if plan is None else AutoQRAQuantConfig(plan=plan)
        base = AutoModelForCausalLM.from_pretrained(self.model_id, dtype=torch.bfloat16, quantization_config=config)
        if plan is None or not any(layer.rank for layer in plan.values()):
            return base
        return get_peft_model(base, AutoQRAConfig(plan=plan))

    def batches(self, texts: list[str], batch_size: int = 8) -> Batches:
        """Tokenized and padded, with labels."""
        self.tokenizer.padding_side = "right"
        result = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                texts[start : start + batch_size],
                truncation=True,
                max_length=self.options.max_length,
                padding=True,
                return_tensors="pt",
            )
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            result.append({**batch, "labels": labels})
        return result

    def losses(self, train: Batches, texts: Mapping[str, Batches], cache: Path) -> list[dict[str, Any]]:
        """One row for each way to quantize and start."""
        rows = []
        for name, plan, alternations in self.configurations():
            start = time.perf_counter()
            if plan is not None and plan.quantizer.backend != "bitsandbytes" and alternations is not None:
                plan = calibrate_plan(plan, self.load(), train, alternations=alternations, cache_dir=cache)
            seconds = time.perf_counter() - start
            model = self.load(plan)
            row = {"name": name, "calibration_seconds": round(seconds, 1)}
            row |= {f"loss_{key}": held_out_loss(model, batches).mean for key, batches in texts.items()}
            rows.append(row)
            print(row, flush=True)
        return rows

    def configurations(self) -> list[tuple[str, BitRankPlan | None, int | None]]:
        """Name, plan (None: unquantized), alternations (None: without calibration)."""
        model = self.load()
        result: list[tuple[str, BitRankPlan | None, int | None]] = [
            ("16 bits", None, None),
            ("NF4, zero start", uniform_plan(model, 4, RANK, quantizer=NF4), None),
            ("bitsandbytes int8, zero start", uniform_plan(model, 8, RANK, quantizer=NF4), None),
        ]
        backends = ("native",) if self.options.quick else ("native", "gptq")
        for bits in (3,) if self.options.quick else (2, 3, 4, 8):
            plans = {name: QuantizerSettings(backend=name) for name in backends}  # type: ignore[arg-type]
            result.append((f"{bits} bits, no data, zero start", uniform_plan(model, bits, RANK), None))
            for name, quantizer in plans.items():
                result.append(
                    (f"{bits} bits, {name}, no adapter", uniform_plan(model, bits, 0, quantizer=quantizer), 0)
                )
                result.append(
                    (f"{bits} bits, {name}, r={RANK}", uniform_plan(model, bits, RANK, quantizer=quantizer), 0)
                )
            if bits < 4 and not self.options.quick:
                best = uniform_plan(model, bits, RANK, quantizer=plans["gptq"])
                result.append((f"{bits} bits, gptq, r={RANK}, alternated", best, 3))
        return result

    def switching(self, train: Batches, cache: Path) -> dict[str, float]:
        """Milliseconds that a resident model takes to become another plan, by mode; median over plans."""
        bit_choices, result = (2, 3, 4, 8), {}
        model = self.load()
        linears = linear_targets(model)
        settings = BankSettings(
            module_names=tuple(linears),
            bit_choices=bit_choices,
            quantizer=QuantizerSettings(),
            fit=FitSettings(max_rank=64),
        )
        start = time.perf_counter()
        bank = build_calibration_bank(model, train, settings, directory=cache)
        result["bank_seconds"] = round(time.perf_counter() - start, 1)
        for materialize in (False, True):
            mode = "materialized" if materialize else "packed"
            model = self.load()
            resident = ResidentModel(model, linear_targets(model), bank, materialize=materialize)
            for bits in bit_choices:  # as after the first trials of a search
                resident.load(uniform_plan(self.load(), bits, RANK), with_corrections=False)
            for share in (5, 1):
                changed = f"{mode}, 1 of {share} modules changes" if share > 1 else f"{mode}, all modules change"
                for with_corrections in (False, True):
                    key = changed + (", adapters folded in" if with_corrections else "")
                    result[key] = _switch_ms(resident, bank, share, with_corrections=with_corrections)
        return result


def _switch_ms(resident: ResidentModel, bank: CalibrationBank, share: int, *, with_corrections: bool) -> float:
    """Median over switches in which bits and rank of one of ``share`` modules change."""
    bits, ranks = bank.settings.bit_choices, (4, 8, 16, 64)
    layers = {name: LayerPlan(bits[i % 4], ranks[i // 4 % 4]) for i, name in enumerate(bank.settings.module_names)}
    seconds = []
    for step in range(24):
        for i, name in enumerate(layers):
            if (i + step) % share == 0:
                position = bits.index(layers[name].bits) + 1
                layers[name] = LayerPlan(bits[position % 4], ranks[(position + step) % 4])
        plan = BitRankPlan(layers, initialization="compensate")
        start = time.perf_counter()
        resident.load(plan, with_corrections=with_corrections)
        seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds[8:]), 2)


def print_losses(losses: list[dict[str, Any]]) -> None:
    """A table, and the lines that a release has to reach."""
    by_name = {row["name"]: row for row in losses}
    dense, nf4 = by_name["16 bits"], by_name["NF4, zero start"]
    keys = [key for key in dense if key.startswith("loss_")]
    print(f"\n{'':38}" + "".join(f"{key[5:]:>10} {'rise':>7} {'/ NF4':>6}" for key in keys))
    for row in losses:
        cells = ""
        for key in keys:
            rise = row[key] - dense[key]
            cells += f"{row[key]:10.4f} {rise:+7.3f} {rise / (nf4[key] - dense[key]):6.2f}"
        print(f"{row['name']:38}{cells}")
    for bits, reference, limit in ((3, nf4, 0.03), (4, dense, 0.05)):
        for backend in ("native", "gptq"):
            row = by_name.get(f"{bits} bits, {backend}, r={RANK}")
            if row is not None:
                margin = row["loss_reviews"] - reference["loss_reviews"]
                print(f"{row['name']} - {reference['name']}: {margin:+.4f} (at most {limit:+.2f} wanted)")


def print_switching(switching: dict[str, float]) -> None:
    """A table."""
    print("\nplan switch, milliseconds (under 50 wanted materialized, under 200 packed)")
    for key, value in switching.items():
        print(f"{key:60}{value:8}")


if __name__ == "__main__":
    main()
