"""Fixtures that every test may use: a tiny model made in-process, and the real model and data from the cache."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both before anything imports huggingface_hub or tokenizers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).parent.parent
pytest_plugins = ["tests.conformance.table"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-screenshots", action="store_true", help="write the screenshots of docs/report.md")


@dataclass(frozen=True, kw_only=True)
class DemoAssets:
    """Folders that scripts/prepare_demo_assets.py made: a model, and data sets with train, dev and test.jsonl."""

    model: Path
    imdb: Path
    rotten_tomatoes: Path


class TinyLlamaFactory(Protocol):
    """Makes a tiny random Llama in eval mode; the same seed and settings give the same weights."""

    def __call__(self, *, seed: int = 0, **config_overrides: Any) -> LlamaForCausalLM: ...


@pytest.fixture(scope="session")
def demo_assets() -> DemoAssets:
    command = [sys.executable, str(REPOSITORY / "scripts" / "prepare_demo_assets.py"), "--json"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode != 0:
        pytest.fail(f"the demo assets cannot be prepared:\n{completed.stderr[-2000:]}", pytrace=False)
    return DemoAssets(**{name: Path(path) for name, path in json.loads(completed.stdout).items()})


@pytest.fixture(scope="session")
def metric_modules(tmp_path_factory) -> Path:
    """Where `evaluate` puts scripts to import them; one folder for a process, which imports its package once."""
    import evaluate.config  # noqa: PLC0415 - few tests need it

    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.getbasetemp() / "metric_modules"
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", directory)
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield directory


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlamaFactory:
    def make(*, seed: int = 0, **config_overrides: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**settings | config_overrides)).eval()

    return make
