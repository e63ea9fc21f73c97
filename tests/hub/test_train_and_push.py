"""``autoqra train --push_to_hub``."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from peft import AutoPeftModelForCausalLM

from peft_autoqra import cli
from tests.conftest import TinyLlamaFactory
from tests.hub.conftest import ME, Hub
from tests.tiny_folder import TinyFolder, make_tiny_folder
from tests.tuner.synthetic import logits


@pytest.fixture
def tiny(tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyFolder:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "tiny").mkdir()
    return make_tiny_folder(tmp_path / "tiny", tiny_llama())


def flags(tiny: TinyFolder, output: Path, *more: str) -> list[str]:
    pushing = ["--push_to_hub", "--hub_model_id", "me/tuned", *more]
    return ["train", *tiny.flags, "--bits", "3", "--r", "4", "--output_dir", str(output), *pushing]


def test_the_adapter_goes_up_and_the_token_stays(hub: Hub, tiny: TinyFolder, tmp_path: Path) -> None:
    hub.log_in(None)
    output = tmp_path / "adapter"
    assert cli.main(flags(tiny, output, "--hub_token", ME, "--save_strategy", "steps", "--save_steps", "1")) == 0
    files = hub.server.repository("me/tuned").files()
    assert "adapter_model.safetensors" in files
    assert not any(name.startswith(("checkpoint", "training_args", "optimizer")) for name in files)
    assert b"import peft_autoqra" in files["README.md"]
    everywhere = [*files.values(), *(path.read_bytes() for path in output.rglob("*") if path.is_file())]
    assert not any(ME.encode() in content for content in everywhere)
    again = AutoPeftModelForCausalLM.from_pretrained("me/tuned", token=ME)
    assert torch.equal(logits(again), logits(AutoPeftModelForCausalLM.from_pretrained(output)))


def test_a_refused_push_is_known_before_training(
    hub: Hub, tiny: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.log_in(None)
    assert cli.main(flags(tiny, tmp_path / "adapter")) == 4
    assert "token" in capsys.readouterr().err
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_dry_run_makes_no_repository(hub: Hub, tiny: TinyFolder, tmp_path: Path) -> None:
    assert cli.main(flags(tiny, tmp_path / "adapter", "--dry_run")) == 0
    with pytest.raises(KeyError):
        hub.server.repository("me/tuned")
