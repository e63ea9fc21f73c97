"""Whether the best learning rate moves with the rank of the adapters, by scaling rule: short fine-tunes of SmolLM2.

Adapters of rank r are scaled by ``2 * (16 / r) ** p``: at p = 1/2 that is rsLoRA with the default alpha of 8, p = 1 is
classic LoRA with alpha 32. Where adapters start at the correction of the quantization error, its magnitude may also be
shared differently between A and B: rows of A ``(r / 16) ** balance`` times longer than those of PEFT, columns of B as
much shorter. To Adam, p = 3/2 with a balance of 1/2 is p = 1/2 with learning rates ``sqrt(16 / r)`` times as large:
start and steps of the products are the same; plans are trained so (``peft_autoqra/tuner/rank_scaling.py``). All rules
agree at rank 16.

For every rank and rule, learning rates a factor of two apart are tried until both neighbors of the best one are worse;
the optimum is where a parabola through these three has its minimum. Intervals are of a bootstrap over the held-out
sequences. Bits are uniform, batches and their order the same in all runs.

Every run is kept in ``--runs``, so a stopped sweep goes on; where that file is missing, from the runs in ``--output``.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher
from peft_autoqra.evaluation.resident_model import ResidentModel
from peft_autoqra.evaluation.sft import SFTEvaluator
from peft_autoqra.importance.calibration_bank import CalibrationBank
from peft_autoqra.plan import LayerPlan
from peft_autoqra.plan_calibration import Correction, PlanCalibration
from peft_autoqra.trial import Fidelity
from peft_autoqra.tuner.rank_scaling import alpha_of_rank, row_factor

SHARED_RANK, SHARED_SCALING = 16, 2.0
FIRST_POWER = -1
BASE_LEARNING_RATE = 1e-3
NUM_EVAL_SEQUENCES = 64
NUM_RESAMPLES = 2000
PACKAGES = ("peft-autoqra", "torch", "transformers", "peft", "trl")

Losses = dict[int, npt.NDArray[np.float64]]
"""Learning rate, as a power of two times the base one, to the losses of the held-out sequences; without gaps."""


@dataclass(frozen=True)
class Series:
    """Fine-tunes that differ in rank and learning rate.

    Attributes:
        bits: of every module.
        corrected: adapters start at the calibrated correction of the quantization error, not at zero.
        exponent: p of the scaling.
        balance: rows of A start ``(r / 16) ** balance`` times longer and columns of B as much shorter.
        ranks: of every module.
    """

    bits: int
    corrected: bool
    exponent: float
    balance: float = 0.0
    ranks: tuple[int, ...] = (4, 16, 64)


SERIES = (
    Series(3, True, 0.5),
    Series(3, True, 1.0),
    Series(3, True, 1.5, balance=0.5),
    Series(16, False, 0.5, ranks=(SHARED_RANK,)),
)
"""The last one is LoRA on the unquantized model, for reference."""


@dataclass(frozen=True)
class Setting:
    """What is trained; its runs differ in the learning rate only."""

    bits: int
    corrected: bool
    rank: int
    scaling: float
    row_factor: float


def main() -> None:
    """Run what is missing, print, write JSON."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(options, scratch)
        chosen = (Series(3, True, 0.5, ranks=(SHARED_RANK,)),) if options.quick else SERIES
        measured = {series: sweep.measure(series) for series in chosen}
    rows = [summarize(series, losses) for series, losses in measured.items() if all(losses.values())]
    print_table(rows)
    if not options.quick:
        save(options, sweep, rows)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_steps", type=int, default=16, help="training steps of a run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no_runs", action="store_true", help="write what is there, without series that lack runs")
    parser.add_argument("--quick", action="store_true", help="2 steps at one rank; writes no file")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--runs", type=Path, default=Path("runs/learning-rates.jsonl"), help="every run, one per line")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/learning-rates.json"))
    options = parser.parse_args()
    if options.quick:
        options.num_steps = 2
    return options


def make_searcher(options: argparse.Namespace, scratch: str) -> AutoQRASearcher:
    """Model, data and recipe."""
    script = Path(__file__).with_name("prepare_demo_assets.py")
    output = subprocess.run([sys.executable, script, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assets = json.loads(output)
    train, dev = (
        Dataset.from_json(f"{assets['imdb']}/{split}.jsonl").select(range(size)).select_columns(["text"])
        for split, size in (("train", 2000), ("dev", NUM_EVAL_SEQUENCES))
    )
    args = SFTConfig(
        output_dir=scratch,
        max_steps=options.num_steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        max_length=64,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
    )
    return AutoQRASearcher(
        AutoModelForCausalLM.from_pretrained(assets["model"], dtype=torch.bfloat16),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=AutoTokenizer.from_pretrained(assets["model"]),
        args=args,
        search_config=AutoQRASearchConfig(
            memory_budget="4bit",
            num_calibration_sequences=128,
            num_eval_sequences=NUM_EVAL_SEQUENCES,
            cache_dir=str(options.cache_dir),
            output_dir=scratch,
        ),
    )


class RebalancedBank(CalibrationBank):
    """A bank whose corrections are the same products of other factors."""

    def __init__(self, bank: CalibrationBank, row_factor: float) -> None:
        """Share the entries."""
        vars(self).update(vars(bank))
        self._row_factor = row_factor

    def for_layers(self, layers: Mapping[str, LayerPlan]) -> PlanCalibration:
        """With longer rows of the right factor."""
        calibration = super().for_layers(layers)
        corrections = {
            name: Correction(left=c.left / self._row_factor, right=c.right * self._row_factor)
            for name, c in calibration.corrections.items()
        }
        return replace(calibration, corrections=corrections)


class Sweep:
    """Runs by setting and learning rate; the model is loaded when one is missing.

    Args:
        options: command line.
        scratch: folder for what is not kept.
    """

    def __init__(self, options: argparse.Namespace, scratch: str) -> None:
        """Read the runs of an earlier sweep."""
        self._options, self._scratch = options, scratch
        rows = [] if options.quick else earlier_runs(options)
        self.rows = [row for row in rows if row["num_steps"] == options.num_steps]

    @cached_property
    def _searcher(self) -> AutoQRASearcher:
        return make_searcher(self._options, self._scratch)

    @cached_property
    def _bank(self) -> CalibrationBank:
        return self._searcher.calibrate()

    @cached_property
    def _resident(self) -> ResidentModel:
        setup = self._searcher.setup
        return ResidentModel(setup.model, setup.linears, self._bank)

    def measure(self, series: Series) -> dict[int, Losses]:
        """Losses by rank and learning rate."""
        result = {}
        for rank in series.ranks:
            scaling = SHARED_SCALING * (SHARED_RANK / rank) ** series.exponent
            row_factor = (rank / SHARED_RANK) ** series.balance
            result[rank] = self._bracketed(Setting(series.bits, series.corrected, rank, scaling, row_factor))
        return result

    def _bracketed(self, setting: Setting) -> Losses:
        """Losses at learning rates around the best one, run where they are missing; none where they may not be."""
        missing = [FIRST_POWER]
        while missing:
            if missing[0] not in self._known(setting):
                if self._options.no_runs:
                    return {}
                self._run(setting, missing[0])
            losses = self._known(setting)
            best = best_power(losses)
            missing = [power for power in (best - 1, best + 1) if power not in losses]
        return losses

    def _known(self, setting: Setting) -> Losses:
        rows = [row for row in self.rows if asdict(setting).items() <= row.items()]
        return {row["power"]: np.array(row["sequence_losses"]) for row in rows}

    def _run(self, setting: Setting, power: int) -> None:
        setup, num_steps = self._searcher.setup, self._options.num_steps
        args = copy.copy(setup.args)
        args.learning_rate = BASE_LEARNING_RATE * 2.0**power
        # the package's rule divides the alpha by the root of the rank and more, and makes A's rows longer
        alpha = setting.scaling * math.sqrt(setting.rank) / alpha_of_rank(1, setting.rank)
        bank = RebalancedBank(self._bank, setting.row_factor / row_factor(setting.rank))
        evaluator = SFTEvaluator(self._resident, setup.data, bank, args, alpha)
        layers = setup.space.decode(setup.space.uniform(setting.bits, setting.rank))
        plan = setup.plan(layers, setup.quantizer, compensate=setting.corrected)
        result = evaluator.evaluate(plan, Fidelity(num_steps, NUM_EVAL_SEQUENCES))
        if result.loss is None:
            raise RuntimeError(f"{setting} at learning rate {args.learning_rate}: {result.error}")
        row = {
            **asdict(setting),
            "num_steps": num_steps,
            "power": power,
            "learning_rate": args.learning_rate,
            "loss": round(result.loss, 5),
            "seconds": round(result.seconds, 1),
            "sequence_losses": [round(loss, 4) for loss in result.sequence_losses],
        }
        print({key: value for key, value in row.items() if key != "sequence_losses"}, flush=True)
        self.rows.append(row)
        if not self._options.quick:
            self._options.runs.parent.mkdir(parents=True, exist_ok=True)
            with self._options.runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def earlier_runs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of a sweep that was stopped, else of the one that was published."""
    if options.runs.exists():
        return [json.loads(line) for line in options.runs.read_text("utf-8").splitlines()]
    if options.output.exists():
        rows: list[dict[str, Any]] = json.loads(options.output.read_text("utf-8"))["runs"]
        return rows
    return []


def best_power(losses: Mapping[int, npt.NDArray[np.float64]]) -> int:
    """The measured learning rate of the smallest mean loss."""
    return min(losses, key=lambda power: float(losses[power].mean()))


def resampled(losses: Losses, sequences: npt.NDArray[np.int64]) -> Losses:
    """The losses of some sequences."""
    return {power: values[sequences] for power, values in losses.items()}


def parabola(losses: Losses) -> tuple[int, float, float, float]:
    """Mean loss as ``value + slope * d + curvature * d^2 / 2`` where ``d = power - center``, at the best measured one.

    The center has neighbors on both sides, so it is next to the best one where resampling made an end the best.

    Returns:
        center, value, slope, curvature.
    """
    center = min(max(best_power(losses), min(losses) + 1), max(losses) - 1)
    below, at, above = (float(losses[center + offset].mean()) for offset in (-1, 0, 1))
    return center, at, (above - below) / 2, below - 2 * at + above


def optimum(losses: Losses) -> float:
    """Power of the best learning rate, not beyond the measured ones."""
    center, _, slope, curvature = parabola(losses)
    if curvature <= 0:
        return float(best_power(losses))
    return float(np.clip(center - slope / curvature, min(losses), max(losses)))


def loss_above_optimum(losses: Losses, power: float) -> float:
    """What a learning rate loses against the best one, by the parabola."""
    curvature = parabola(losses)[3]
    return curvature * (power - optimum(losses)) ** 2 / 2


def summarize(series: Series, measured: Mapping[int, Losses]) -> dict[str, Any]:
    """Best learning rates by rank, and their slope over the rank."""
    shared = optimum(measured[SHARED_RANK])
    powers = np.array([[optimum(losses) for losses in sample.values()] for sample in samples_of(measured)])
    summary = asdict(series) | {
        "best_learning_rate": {rank: BASE_LEARNING_RATE * 2 ** optimum(losses) for rank, losses in measured.items()},
        "best_learning_rate_interval": {
            rank: [BASE_LEARNING_RATE * 2**end for end in interval(column)]
            for rank, column in zip(measured, powers.T, strict=True)
        },
        "smallest_loss": {rank: float(losses[best_power(losses)].mean()) for rank, losses in measured.items()},
        f"lost_at_best_of_rank_{SHARED_RANK}": {
            rank: loss_above_optimum(losses, shared) for rank, losses in measured.items()
        },
    }
    if len(measured) > 1:
        slopes = [slope_over_rank(sample) for sample in samples_of(measured)]
        summary |= {"slope": slope_over_rank(measured), "slope_interval": interval(slopes)}
    return summary


def samples_of(measured: Mapping[int, Losses]) -> Iterator[dict[int, Losses]]:
    """Bootstrap samples of the sequences: the same ones in all runs, and at every call."""
    rng = np.random.default_rng(0)
    for _ in range(NUM_RESAMPLES):
        sequences = rng.integers(NUM_EVAL_SEQUENCES, size=NUM_EVAL_SEQUENCES)
        yield {rank: resampled(losses, sequences) for rank, losses in measured.items()}


def slope_over_rank(measured: Mapping[int, Losses]) -> float:
    """Least-squares ``d log(best learning rate) / d log(rank)``."""
    powers = [optimum(losses) for losses in measured.values()]
    return float(np.polyfit(np.log2(list(measured)), powers, 1)[0])


def interval(values: Sequence[float] | npt.NDArray[np.float64]) -> list[float]:
    """Of 95%."""
    low, high = np.quantile(values, (0.025, 0.975))
    return [float(low), float(high)]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown."""
    ranks = sorted({rank for row in rows for rank in row["ranks"]})
    columns = ["bits", "start", "p", "balance", *(f"best at r={rank} (loss)" for rank in ranks), "slope (95%)"]
    print("\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = [str(row["bits"]), "correction" if row["corrected"] else "zero"]
        cells += [f"{row['exponent']:g}", f"{row['balance']:g}"]
        for rank in ranks:
            rate = row["best_learning_rate"].get(rank)
            cells.append("" if rate is None else f"{rate:.1e} ({row['smallest_loss'][rank]:.3f})")
        low, high = row.get("slope_interval", (0, 0))
        cells.append(f"{row['slope']:+.2f} ({low:+.2f} to {high:+.2f})" if "slope" in row else "")
        print("| " + " | ".join(cells) + " |")


def save(options: argparse.Namespace, sweep: Sweep, summary: list[dict[str, Any]]) -> None:
    """Everything that was measured."""
    content = {
        "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "num_steps": options.num_steps,
        "summary": summary,
        "runs": sweep.rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
