"""``autoqra train`` in two real processes, which talk by gloo on the CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file

from peft_autoqra import BitRankPlan
from peft_autoqra.cli import main
from tests.distributed.conftest import REPOSITORY, Runs, call
from tests.distributed.scenarios import SCENARIOS, Scenario

AS_ONE_PROCESS = {
    "ddp": "single",
    "ddp-nf4": "single-nf4",
    "fsdp2": "single",
    "fsdp2-nf4": "single-nf4",
    "fsdp2-int8": "single-int8",
    "fsdp2-plan": "single-plan",
    "fsdp2-each-reads": "single-plan",
    "ddp-resumed": "single-plan",
    "fsdp2-resumed": "single-plan",
}
"""Runs of two processes, and what one process with the same batches makes."""
RTOL, ATOL = 1e-3, 1e-5
"""Sums of gradients round otherwise, and Adam divides small gradients by small ones."""


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def settings(adapter: Path) -> dict:
    content = json.loads((adapter / "adapter_config.json").read_text())
    return content | {"target_modules": sorted(content["target_modules"])}  # a set in memory


def header(adapter: Path) -> dict[str, str]:
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return file.metadata()


def logits(adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(input_ids=torch.arange(12)[None]).logits


def assert_trained_alike(directory: Path, reference: Path) -> None:
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (directory, reference))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=RTOL, atol=ATOL, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("name", "reference"), AS_ONE_PROCESS.items())
def test_two_processes_train_what_one_does(runs: Runs, name: str, reference: str) -> None:
    outcome = runs.of(name)
    assert [process["code"] for process in outcome.processes] == [0, 0]
    assert_trained_alike(outcome.output_dir, runs.output_dir(reference))
    assert outcome.result["eval_loss"] == pytest.approx(runs.of_one(reference)["eval_loss"], abs=1e-4)
    torch.testing.assert_close(logits(outcome.output_dir), logits(runs.output_dir(reference)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["", "nf4-"])
def test_mixed_precision(runs: Runs, backend: str) -> None:
    result, expected = runs.of(f"fsdp2-{backend}bf16").result, runs.of_one(f"single-{backend}bf16")
    assert result["train_loss"] == pytest.approx(expected["train_loss"], abs=3e-3)
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], abs=3e-3)
    assert result["eval_loss"] != torch.tensor(result["eval_loss"]).bfloat16().item()


@pytest.mark.parametrize(("name", "reference"), AS_ONE_PROCESS.items())
def test_the_first_process_writes_and_prints_what_one_would(runs: Runs, name: str, reference: str) -> None:
    outcome = runs.of(name)
    first, second = (process["out"] for process in outcome.processes)
    assert "held-out loss" in first
    assert "held-out loss" not in second
    by_process = {f"checkpoint-{step}/rng_state_{rank}.pth" for step in (2, 4) for rank in (0, 1)}
    found = files(outcome.output_dir) - by_process
    expected = files(runs.output_dir(reference))
    if "resumed" in name:  # the checkpoint it goes on from lies in the other folder
        found, expected = ({file for file in names if "checkpoint-2" not in file} for names in (found, expected))
    alone = {file for file in expected if file.endswith("rng_state.pth")}
    assert found - alone == expected - alone
    plans = [BitRankPlan.from_pretrained(folder) for folder in (outcome.output_dir, runs.output_dir(reference))]
    digests = [plan.calibration and plan.calibration.digest for plan in plans]
    assert digests[0] == digests[1]
    assert dict(plans[0]) == dict(plans[1])
    both = (outcome.output_dir, runs.output_dir(reference))
    assert settings(both[0]) == settings(both[1])
    assert header(both[0]) == header(both[1])


def test_memory_is_that_of_one_process_and_with_fsdp2_its_part(runs: Runs) -> None:
    alone = runs.of_one("single")
    for name in ("ddp", "ddp-nf4"):
        result = runs.of(name).result
        assert (result["num_processes"], result["strategy"]) == (2, "ddp")
        assert result["measured"] == result["estimated"]
    result = runs.of("fsdp2").result
    assert (result["num_processes"], result["strategy"]) == (2, "fsdp2")
    assert result["estimated"] == alone["estimated"] == alone["measured"]
    for part, size in result["measured"].items():
        assert size == pytest.approx(alone["measured"][part] / 2, rel=0.05), part
    nf4 = runs.of("fsdp2-nf4").result
    assert nf4["measured"]["weight_bytes"] * 2 == nf4["estimated"]["weight_bytes"]
    assert nf4["measured"]["metadata_bytes"] == nf4["estimated"]["metadata_bytes"]


@pytest.mark.parametrize("checkpoint_of", ["ddp", "fsdp2", "fsdp2-nf4"])
def test_one_process_goes_on_from_a_checkpoint_of_two(runs: Runs, tmp_path: Path, checkpoint_of: str) -> None:
    reference = AS_ONE_PROCESS[checkpoint_of]
    bits = next(s.bits for s in SCENARIOS if s.name == checkpoint_of)
    scenario = Scenario(name=str(tmp_path / "adapter"), num_processes=1, bits=bits, resumes=checkpoint_of)
    assert main(["train", *runs.argv(scenario)]) == 0
    assert_trained_alike(tmp_path / "adapter", runs.output_dir(reference))


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("refused-fsdp1", 2, "FSDP1 joins .* fsdp_version: 2"),
        ("refused-on-cpus", 2, "not over CPUs.*cpu_two_processes.yaml"),
        ("refused-checkpoint", 2, "checkpoint-2 was trained with other bits"),
        ("refused-plan", 4, "no-such-plan"),  # it may be on the hub, which is not asked here
    ],
)
def test_refusals_come_from_all_processes_and_leave_no_folder(runs: Runs, name: str, code: int, words: str) -> None:
    outcome = runs.of(name)
    for process in outcome.processes:
        assert process["code"] == code
        assert re.search(words, process["err"])
    assert not outcome.output_dir.exists()


def test_accelerate_starts_two_processes_on_cpus(runs: Runs, tmp_path: Path) -> None:
    configuration = REPOSITORY / "examples" / "accelerate" / "cpu_two_processes.yaml"
    scenario = Scenario(name=str(tmp_path / "adapter"), num_processes=2, bits=None)
    argv = [flag for flag in runs.argv(scenario) if flag != "--use_cpu"]  # found out
    script = str(REPOSITORY / "scripts" / "finetune.py")
    done = call(["accelerate.commands.launch", "--config_file", str(configuration), script, *argv, "--json"], tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    document = json.loads(done.stdout)  # one, and nothing beside
    assert (document["command"], document["num_processes"], document["strategy"]) == ("train", 2, "ddp")
    assert_trained_alike(tmp_path / "adapter", runs.output_dir("single-plan"))
