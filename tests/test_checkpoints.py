"""Which checkpoints a fine-tune goes on from, and which it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from peft_autoqra import BitRankPlan, LayerPlan, QuantizerSettings, calibrate_plan, uniform_plan
from peft_autoqra.checkpoints import CONTENTS_FILE, check_checkpoint, find_checkpoint
from peft_autoqra.commands import train as train_command
from peft_autoqra.errors import PlanMismatchError
from peft_autoqra.recipe import RecipeError
from tests.tiny_folder import TinyFolder, make_tiny_folder

STEPS = ["--max_steps", "2", "--save_steps", "1"]
CALIBRATED = ["--bits", "3", "--lora_r", "4", "--num_calibration_sequences", "4"]
FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama) -> TinyFolder:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"), tiny_llama())


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """An adapter with checkpoints of its two steps."""
    output_dir = tmp_path_factory.mktemp("trained") / "adapter"
    train_command.run([*tiny.flags, *CALIBRATED, *STEPS, "--output_dir", str(output_dir)])
    return output_dir


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def find(adapter: Path, wanted: object) -> str | None:
    return find_checkpoint(SFTConfig(output_dir=str(adapter), use_cpu=True, bf16=False, resume_from_checkpoint=wanted))


def damage(file: Path, how: str) -> None:
    if how == "lacks":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_whole_ones_are_found(adapter):
    last = str(adapter / "checkpoint-2")
    shutil.copytree(last, adapter / "checkpoint-best")  # of another tool
    assert find(adapter, "true") == find(adapter, True) == find(adapter, last) == last
    assert find(adapter, None) is find(adapter, "false") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["lacks", "has a damaged"])
def test_one_that_is_not_whole_is_refused_or_passed_over(adapter, name, how):
    damage(adapter / "checkpoint-2" / name, how)
    with pytest.raises(RecipeError, match=f"checkpoint-2 {how} {name}"):
        find(adapter, str(adapter / "checkpoint-2"))
    with pytest.warns(UserWarning, match=f"checkpoint-2 {how} {name}, and is passed over"):
        assert find(adapter, "true") == str(adapter / "checkpoint-1")


def test_what_is_not_there_is_refused_and_no_folder_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "load_base_model", None)
    for wanted, words in (("true", "no checkpoint in"), (str(tmp_path / "other"), "no folder of a checkpoint")):
        argv = [*tiny.flags, "--output_dir", str(tmp_path / "adapter"), "--resume_from_checkpoint", wanted]
        with pytest.raises(RecipeError, match=words):
            train_command.run(argv)
        assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("flags", [["--bits", "4", "--lora_r", "4"], ["--bits", "3", "--lora_r", "2"]])
def test_other_bits_or_ranks_are_refused(tiny, trained, tmp_path, flags):
    argv = [*tiny.flags, *flags, "--resume_from_checkpoint", str(trained / "checkpoint-1")]
    with pytest.raises(PlanMismatchError, match="checkpoint-1 was trained with other bits, ranks or modules"):
        train_command.run([*argv, "--output_dir", str(tmp_path / "adapter")])


def test_another_plan_is_refused_before_the_model_is_read(tiny, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "load_base_model", None)
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    plan = uniform_plan(base, 3, 4)
    first = next(iter(plan))
    others = {
        "one rank": plan.replace(layers={**plan, first: LayerPlan(3, 8)}),
        "the quantizer": uniform_plan(base, 3, 4, quantizer=QuantizerSettings(group_size=32)),
        "the calibration": calibrate_plan(plan, base, [{"input_ids": torch.arange(16)[None]}]),
        "no calibration": plan,
    }
    for name, other in others.items():
        other.save_pretrained(tmp_path / name)
        argv = [*tiny.flags, "--plan", str(tmp_path / name), "--output_dir", str(tmp_path / "adapter")]
        with pytest.raises(PlanMismatchError, match="checkpoint-1 was trained with "):
            train_command.run([*argv, "--resume_from_checkpoint", str(trained / "checkpoint-1")])
    assert not (tmp_path / "adapter").exists()


def test_the_plan_it_was_trained_with_is_taken(tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    plan = calibrate_plan(uniform_plan(base, 3, 4), base, [{"input_ids": torch.arange(16)[None]}])
    plan.save_pretrained(tmp_path / "plan")
    train_command.run(
        [*tiny.flags, "--plan", str(tmp_path / "plan"), *STEPS, "--output_dir", str(tmp_path / "adapter")]
    )
    check_checkpoint(str(tmp_path / "adapter" / "checkpoint-1"), plan)


def test_without_a_plan_the_calibration_is_the_checkpoints(tiny, adapter, trained, monkeypatch):
    monkeypatch.setattr("peft_autoqra.training.calibrate_plan", None)
    shutil.rmtree(adapter / "checkpoint-2")
    argv = [*tiny.flags, *CALIBRATED, *STEPS, "--output_dir", str(adapter), "--resume_from_checkpoint", "true"]
    assert f"adapters go on from {adapter / 'checkpoint-1'}" in train_command.run(argv).text
    assert BitRankPlan.from_pretrained(adapter) == BitRankPlan.from_pretrained(trained)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, trained))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", [*FILES, "rng_state.pth", "adapter_config.json"])
def test_a_changed_byte_is_noticed(adapter, name):
    path = adapter / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=f"checkpoint-2 has (a damaged|another) {name}"):
        find(adapter, str(adapter / "checkpoint-2"))
    with pytest.warns(UserWarning, match="passed over"):
        assert find(adapter, "true") == str(adapter / "checkpoint-1")


@pytest.mark.parametrize("content", ["{", "[3]", "5"])
def test_a_damaged_note_of_the_contents_is_named(adapter, content):
    (adapter / "checkpoint-2" / CONTENTS_FILE).write_text(content)
    with pytest.raises(RecipeError, match=r"has a damaged autoqra_checkpoint\.json"):
        find(adapter, str(adapter / "checkpoint-2"))


def test_a_checkpoint_of_another_trainer_has_no_note(adapter):
    (adapter / "checkpoint-2" / CONTENTS_FILE).unlink()
    assert find(adapter, "true") == str(adapter / "checkpoint-2")
