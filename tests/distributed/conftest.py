"""Two real processes, started once for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from peft_autoqra import BitRankPlan, LayerPlan, QuantizerSettings, uniform_plan
from peft_autoqra.cli import main
from tests.distributed.scenarios import SCENARIOS, Scenario
from tests.tiny_folder import TinyFolder, make_tiny_folder

REPOSITORY = Path(__file__).parent.parent.parent
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Outcome:
    """What each process said, and what the run left."""

    processes: tuple[dict[str, Any], ...]
    output_dir: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.output_dir / "finetune_result.json").read_text())


@dataclass(frozen=True)
class Runs:
    """A folder with everything: inputs, and the outputs of the runs of one and of two processes."""

    directory: Path

    @property
    def tiny(self) -> TinyFolder:
        return TinyFolder(self.directory / "tiny" / "model", self.directory / "tiny" / "data")

    def output_dir(self, name: str) -> Path:
        return self.directory / name

    def of(self, name: str) -> Outcome:
        files = [self.directory / f"{name}-{rank}.json" for rank in range(2)]
        return Outcome(tuple(json.loads(file.read_text()) for file in files), self.output_dir(name))

    def of_one(self, name: str) -> dict[str, Any]:
        return json.loads((self.output_dir(name) / "finetune_result.json").read_text())

    def argv(self, scenario: Scenario) -> list[str]:
        flags = scenario.flags(self.directory)
        return [*self.tiny.flags, *flags, "--output_dir", str(self.output_dir(scenario.name))]


def environment(**variables: str) -> dict[str, str]:
    """That of a process that imports this checkout."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


def call(command: Sequence[str], directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; one that hangs is an error."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env=environment(**variables),
        timeout=TIMEOUT_SECONDS,
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_llama) -> Runs:
    """One process first, whose checkpoint two go on from; then two processes, which do all their runs one by one."""
    # of all pytest-xdist's workers the first one makes it
    directory = tmp_path_factory.getbasetemp()
    directory = (directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory) / "two-processes"
    with FileLock(f"{directory}.lock"):
        if not (directory / "done").exists():
            _make(Runs(directory), tiny_llama())
            (directory / "done").touch()
    return Runs(directory)


def _make(runs: Runs, model: Any) -> None:
    (runs.directory / "tiny").mkdir(parents=True)
    make_tiny_folder(runs.directory / "tiny", model)
    _mixed_plan(model).save_pretrained(runs.directory / "plan")
    for scenario in SCENARIOS:
        if scenario.num_processes == 1:
            assert main(["train", *runs.argv(scenario)]) == 0, scenario.name
    wanted = [
        {"name": s.name, "argv": runs.argv(s), "variables": s.variables, "shards": s.shards}
        for s in SCENARIOS
        if s.num_processes == 2
    ]
    (runs.directory / "scenarios.json").write_text(json.dumps(wanted))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = call([*launcher, "-m", "tests.distributed.worker", "scenarios.json"], runs.directory)
    assert done.returncode == 0, done.stderr[-5000:]


def _mixed_plan(model: Any) -> BitRankPlan:
    """All bits that there are, among them 16, and a module without adapter."""
    names = list(uniform_plan(model, 4, 4))
    layers = {name: LayerPlan((2, 3, 4, 8, 16)[i % 5], (4, 2, 0)[i % 3]) for i, name in enumerate(names)}
    return uniform_plan(model, 4, 4, quantizer=QuantizerSettings(group_size=32)).replace(layers=layers)
