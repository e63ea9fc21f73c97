"""The examples run as written, on a tiny model and data; what the README says of the repository is true."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import T5Config, T5ForConditionalGeneration

from peft_autoqra import BitRankPlan, LayerPlan, cli
from peft_autoqra.commands import searcher_recipe, train
from tests.tiny_data import VOCAB_SIZE
from tests.tiny_folder import TinyFolder, make_tiny_folder

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama) -> TinyFolder:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"), tiny_llama())


@pytest.fixture
def run_example(monkeypatch, tiny, capsys):
    def run(name: str, *flags: str | Path) -> str:
        argv = [name, "--model", tiny.model, *flags]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def plan_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    names = ("mlp.up_proj", "mlp.down_proj")
    layers = {f"model.layers.{i}.{name}": LayerPlan(3, 4) for i in range(2) for name in names}
    BitRankPlan(layers).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------ examples
def test_search(run_example, tiny, tmp_path):
    flags = ["--dataset", tiny.data, "--output_dir", tmp_path / "out"]
    text = run_example("01_search.py", *flags, "--max_cost", "1000", "--max_trials", "6", "--max_length", "16")
    assert "winner: loss" in text
    assert "qlora-4bit: loss" in text
    assert BitRankPlan.from_pretrained(tmp_path / "out" / "plan")
    assert (tmp_path / "out" / "report.html").exists()


def test_finetune_with_plan(run_example, tiny, plan_folder, tmp_path):
    flags = ["--plan", plan_folder, "--dataset", tiny.data, "--output_dir", tmp_path / "out"]
    run_example("02_finetune_with_plan.py", *flags, "--max_steps", "1", "--max_length", "16")
    assert BitRankPlan.from_pretrained(tmp_path / "out") == BitRankPlan.from_pretrained(plan_folder)


def test_uniform_without_search(run_example, tiny, tmp_path):
    flags = ["--dataset", tiny.data, "--rank", "4", "--max_steps", "1", "--max_length", "16"]
    text = run_example("03_uniform_without_search.py", *flags, "--output_dir", tmp_path / "out")
    assert "average_bits=3.00" in text
    assert "held-out loss" in text
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_share_a_plan_in_a_folder(run_example, plan_folder, tmp_path):
    text = run_example("04_share_a_plan.py", "--plan", plan_folder, "--copy_to", tmp_path / "copy")
    assert "equal: True" in text
    assert "pushed" not in text


def write_rows(folder: Path, row: dict[str, object]) -> Path:
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(8 * (json.dumps(row) + "\n"))
    return folder


def test_seq2seq(run_example, tmp_path):
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=VOCAB_SIZE - 2, eos_token_id=VOCAB_SIZE - 1, decoder_start_token_id=VOCAB_SIZE - 2,
    )  # fmt: skip
    model = make_tiny_folder(tmp_path / "t5", T5ForConditionalGeneration(config)).model
    data = write_rows(tmp_path / "pairs", {"dialogue": "w1 w2 w3 w4", "summary": "w5 w6"})
    flags = ["--model", model, "--dataset", data, "--rank", "4", "--max_steps", "1", "--max_length", "16"]
    text = run_example("05_seq2seq.py", *flags, "--output_dir", tmp_path / "out")
    assert "held-out loss" in text
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(saved["bits_pattern"].values()) == {4}


def test_classification(run_example, tmp_path):
    data = write_rows(tmp_path / "reviews", {"text": "w1 w2 w3", "label": 2})
    flags = ["--dataset", data, "--num_labels", "3", "--rank", "4", "--max_steps", "20"]
    text = run_example("06_classification.py", *flags, "--output_dir", tmp_path / "out")
    assert "accuracy 1.000" in text  # all rows have one label, which is soon learned
    assert "label 2, in the data 2" in text


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")  # TRL's DPO
def test_preference_tuning(run_example, tmp_path):
    row = {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w9 w8"}
    flags = ["--dataset", write_rows(tmp_path / "pairs", row), "--max_steps", "1", "--max_length", "16"]
    text = run_example("07_preference_tuning.py", *flags, "--output_dir", tmp_path / "out")
    assert "initialization='compensate'" in text
    assert "adapters: default, ref" in text
    assert not (tmp_path / "out" / "ref").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name


def test_recipe_is_understood_by_search_and_train(monkeypatch, tmp_path):
    def stop(data, seed):
        raise KeyboardInterrupt

    for module in (searcher_recipe, train):
        monkeypatch.setattr(module, "load_datasets", stop)
    recipe = str(EXAMPLES / "recipe.yaml")
    assert cli.main(["search", "--config", recipe]) == cli.EXIT_INTERRUPTED
    assert cli.main(["train", "--config", recipe]) == cli.EXIT_INTERRUPTED
    assert yaml.safe_load(Path(recipe).read_text())["output_dir"] == "search-out"


# -------------------------------------------------------------------------------------------------------------- README
def readme() -> str:
    return (REPOSITORY / "README.md").read_text()


def tree_paths() -> list[str]:
    tree = re.search(r"```text\n(peft_autoqra/.*?)```", readme(), re.DOTALL).group(1)
    folders: list[str] = []
    paths = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        for name in re.split(r"  +", line.strip())[0].split(", "):
            paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_every_path_of_the_file_tree_exists():
    paths = tree_paths()
    assert len(paths) > 30
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_every_module_is_in_the_file_tree():
    modules = [path for path in (REPOSITORY / "peft_autoqra").rglob("*.py") if path.name != "__init__.py"]
    assert {path.relative_to(REPOSITORY).as_posix() for path in modules} - set(tree_paths()) == set()


def test_python_blocks_run(tiny, tmp_path, monkeypatch):
    """As they stand there, but for a tiny model, tiny data and short runs."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)
    assert len(blocks) == 3
    changes = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(tiny.model),
        "trl-lib/Capybara": str(tiny.data),
        "SFTConfig(": "SFTConfig(use_cpu=True, max_steps=1, report_to=[], ",
        "AutoQRASearchConfig(m": "AutoQRASearchConfig(max_cost=1000.0, max_trials=6, m",
        "max_length=256": "max_length=16",
    }
    for block in blocks:
        for old, new in changes.items():
            block = block.replace(old, new)
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
