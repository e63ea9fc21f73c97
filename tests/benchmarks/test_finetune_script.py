"""scripts/benchmark_finetune.py: what it refuses, and how its processes end."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.finetune.config import Group, read_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/benchmark_finetune.py"
SMALLEST = ROOT / "benchmarks/finetune/configs/smallest.yaml"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_finetune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its main with these flags; nothing is run."""
    monkeypatch.setattr(script, "work", lambda *_: None)

    def main(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path), *flags])
        script.main()

    threads = torch.get_num_threads()
    yield main
    torch.set_num_threads(threads)


def with_entry(tmp_path: Path, old: str, new: str) -> str:
    path = tmp_path / "changed.yaml"
    text = SMALLEST.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return str(path)


def test_the_smallest_configuration_is_the_default(run, script, monkeypatch):
    worked = []
    monkeypatch.setattr(script, "work", lambda config, options: worked.append((config.name, options.tasks)))
    run()
    run("--tasks", "reviews")
    assert worked == [("smallest", None), ("smallest", ["reviews"])]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "review"], r"'review'.*'reviews'"),
        (["--workers", "0"], "--workers 0"),
        (["--threads", "0"], "--threads 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_flags_are_named(run, flags, message):
    with pytest.raises(SystemExit, match=message):
        run(*flags)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("[lora-r16,", "[lora-r17,", r"unknown methods \['lora-r17'\]"), ("[reviews]", "[review]", "unknown tasks")],
)
def test_wrong_configurations_are_named(run, tmp_path, old, new, message):
    with pytest.raises(SystemExit, match=message):
        run("--config", with_entry(tmp_path, old, new))


def test_several_gpus_are_refused(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="CUDA_VISIBLE_DEVICES"):
        run()


def test_a_failure_ends_the_other_processes(run, script, monkeypatch):
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    left = list(others)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(script, "start_worker", left.pop)
    monkeypatch.setattr(script, "work", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        run("--workers", "3")
    assert all(other.wait(timeout=10) < 0 for other in others)


def test_a_failure_of_another_process_is_told(run, script, monkeypatch):
    monkeypatch.setattr(script, "start_worker", lambda: subprocess.Popen(["false"]))
    with pytest.raises(SystemExit, match="another process"):
        run("--workers", "2")


def test_budgets_that_cannot_be_read_are_refused(script: ModuleType, tmp_path: Path) -> None:
    config = read_config(SMALLEST)
    model = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model.save_pretrained(tmp_path)
    setting = config.setting("reviews", str(tmp_path), tmp_path)
    script.check_budgets(config, setting)
    wrong = replace(config, groups=(Group(methods=("uniform",), budgets=("qlora-4bits",)),))
    with pytest.raises(SystemExit, match="qlora-4bits"):
        script.check_budgets(wrong, setting)
