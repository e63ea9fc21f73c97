"""Fine-tunes side by side: method x task x budget x seed of a configuration, each by its own library.

Every run is one JSON line in a file of ``--output_dir``; what is there is not run again, so a stopped benchmark goes
on, and several processes share the work. Without flags the smallest configuration is run, and its figures are printed
beside those on record in ``benchmarks/results/finetune``. ``--render`` writes the tables and pictures of README.md and
docs/finetuning-benchmark.md from the records alone.

    python scripts/benchmark_finetune.py --workers 2
    python scripts/benchmark_finetune.py --workers 2 --config benchmarks/finetune/configs/smollm2-135m.yaml \
        --output_dir benchmarks/results/finetune
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.finetune.budget import limit_of  # noqa: E402
from benchmarks.finetune.config import Config, ConfigError, read_config  # noqa: E402
from benchmarks.finetune.memory_model import memory_model_of  # noqa: E402
from benchmarks.finetune.methods.registry import METHODS  # noqa: E402
from benchmarks.finetune.queue import Queue  # noqa: E402
from benchmarks.finetune.records import Record, read_records  # noqa: E402
from benchmarks.finetune.reproduction import reproduction_lines  # noqa: E402
from benchmarks.finetune.setting import Setting  # noqa: E402
from benchmarks.finetune.tasks import TASKS  # noqa: E402
from peft_autoqra.errors import MemoryBudgetError  # noqa: E402

LOCAL_MODEL = "SmolLM2-135M-Instruct"
RECORDS = ROOT / "benchmarks/results/finetune"


def main() -> None:
    """Run what is missing, or render."""
    options = parse_options()
    if options.render:
        from benchmarks.finetune.rendering import write_rendered  # noqa: PLC0415 - needs no model

        write_rendered(ROOT)
        return
    try:
        config = read_config(options.config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    check(config, options)
    quieten()
    run_all(config, options)
    here = read_records([options.output_dir / f"{config.name}.jsonl"])
    if options.output_dir.resolve() != RECORDS and not options.is_worker:
        print("\n".join(reproduction_lines(here, read_records(sorted(RECORDS.glob("*.jsonl"))))))


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks/finetune/configs/smallest.yaml")
    parser.add_argument("--tasks", nargs="+", help="tasks of the configuration; all by default")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-out"))
    parser.add_argument("--cache_dir", type=Path, default=Path("benchmark-out/cache"), help="plans and calibrations")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--max_seconds", type=float, help="after which no further run is started")
    parser.add_argument("--render", action="store_true", help="write tables and pictures, run nothing")
    parser.add_argument("--is_worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def check(config: Config, options: argparse.Namespace) -> None:
    """Refuse what would fail later, or run nothing, or something else than what is recorded."""
    methods = {name for group in config.groups for name in group.methods}
    if unknown := sorted(methods - METHODS.keys()):
        sys.exit(f"error: {options.config} names unknown methods {unknown}; there are {sorted(METHODS)}.")
    if unknown := sorted(set(config.tasks) - TASKS.keys()):
        sys.exit(f"error: {options.config} names unknown tasks {unknown}; there are {sorted(TASKS)}.")
    if unknown := sorted(set(options.tasks or ()) - set(config.tasks)):
        sys.exit(f"error: --tasks {unknown} are not in {options.config}; it has {list(config.tasks)}.")
    if options.workers < 1 or options.threads < 1:
        sys.exit(f"error: --workers {options.workers} and --threads {options.threads} must be at least 1.")
    if torch.cuda.device_count() > 1:  # the trainer would make every batch as many times as large
        sys.exit("error: a run takes one GPU; set CUDA_VISIBLE_DEVICES to the one that it should take.")


def run_all(config: Config, options: argparse.Namespace) -> None:
    """Beside other processes, which end with this one."""
    workers = [start_worker() for _ in range(options.workers - 1)]
    torch.set_num_threads(options.threads)
    try:
        work(config, options)
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    if any([worker.wait() for worker in workers]):  # noqa: C419 - all of them
        sys.exit("error: another process of this benchmark failed; see above.")


def quieten() -> None:
    """One line a run is enough."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def start_worker() -> subprocess.Popen[bytes]:
    """Another process with the same flags; the runs are shared through locks."""
    return subprocess.Popen([sys.executable, *sys.argv, "--workers", "1", "--is_worker"], env=os.environ.copy())


def work(config: Config, options: argparse.Namespace) -> None:
    """Run what no other process has in hand."""
    model_id = local_model() if config.model == LOCAL_MODEL else config.model
    tasks = options.tasks or config.tasks
    settings = {task: config.setting(task, model_id, options.cache_dir) for task in tasks}
    check_budgets(config, next(iter(settings.values())))
    queue = Queue(config, METHODS, settings, options.output_dir / f"{config.name}.jsonl", options.cache_dir / "locks")
    queue.work(report, max_seconds=options.max_seconds)


def check_budgets(config: Config, setting: Setting) -> None:
    """Refuse a budget that cannot be read before anything runs."""
    memory_model = memory_model_of(setting, setting.recipe.sft_config(setting.folder))
    for budget in sorted({budget for group in config.groups for budget in group.budgets}):
        try:
            limit_of(budget, memory_model)
        except MemoryBudgetError as error:
            sys.exit(f"error: configuration {config.name}: {error}")


def local_model() -> str:
    """Folder of the model that a package registry has; made where missing."""
    script = Path(__file__).with_name("prepare_demo_assets.py")
    output = subprocess.run([sys.executable, script, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
    folder: str = json.loads(output)["model"]
    return folder


def report(record: Record) -> None:
    """One line."""
    run = record.run
    figures = record.reason
    if record.dev and record.test:
        metric = "" if record.test.metric is None else f", metric {record.test.metric:.3f}"
        figures = f"dev {record.dev.loss:.4f}, test {record.test.loss:.4f}{metric}"
        figures += f"; {record.mean_bits} bits, rank {record.mean_rank}, {record.train_seconds:.0f} s"
    name = f"{run.method}{f' at {run.budget}' if run.budget else ''}"
    clock = time.strftime("%H:%M:%S")
    print(f"{clock} {run.task} {name}, {run.learning_rate:g}, seed {run.seed}: {record.status}: {figures}", flush=True)


if __name__ == "__main__":
    main()
