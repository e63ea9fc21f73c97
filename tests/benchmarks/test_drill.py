"""The reliability drill in small: each part once, and that it notices what is lost."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

from benchmarks.drill.corruption import damage, drill_corruption
from benchmarks.drill.disk_full import FullDiskDrill
from benchmarks.drill.jobs import SearchJob, TrainJob, differences, make_inputs
from benchmarks.drill.kills import KillDrill
from benchmarks.drill.outcome import Attempt, PartOutcome
from benchmarks.drill.processes import Command, Processes
from benchmarks.drill.races import drill_races
from benchmarks.drill.trouble import drill_trouble
from peft_autoqra.plan_file import PLAN_FILE
from tests.tiny_folder import TinyFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed by signals")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    before = dict(os.environ)
    yield Processes(tmp_path_factory.mktemp("processes"))
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def flags(processes, tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("drill") / "inputs"
    assert processes.call(make_inputs, folder).ended().code == 0
    return tuple(TinyFolder(folder / "model", folder / "data").flags)


def lost(attempts):
    return [attempt for attempt in attempts if attempt.defect is not None]


def test_a_killed_search_ends_as_if_undisturbed(processes, flags, tmp_path):
    drill = KillDrill(processes, SearchJob(flags, tmp_path / "search"), (processes.caches,))
    attempts = drill.run(2, random.Random(0))
    assert len(attempts) == 2
    assert not lost(attempts)
    # what it would not let pass: a trial that is logged twice, another plan
    job = SearchJob(flags, tmp_path / "search")
    assert job.partway_defect(drill.reference) is None
    log = job.folder / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"kind": "trial"' in line)
    log.write_text("".join([*lines, lines[last]]))
    assert "logged twice" in job.partway_defect(drill.reference)
    log.write_text("".join(lines))
    assert differences(job.state(), drill.reference) is None
    log.write_text("".join(lines[:last] + lines[last + 1 :]))
    assert differences(job.state(), drill.reference).startswith("['trials'] differ")
    assert job.partway_defect({**drill.reference, "plan": None}) is not None
    (job.folder / "plan" / PLAN_FILE).write_bytes(b"half")
    assert job.partway_defect(drill.reference) is None  # refused


def test_training_goes_on_when_the_disk_has_room_again(processes, flags, tmp_path):
    drill = FullDiskDrill(processes, TrainJob(flags, tmp_path / "training"), disk=None)
    attempt = drill.starved(random.Random(1))
    assert attempt.defect is None
    assert attempt.found == "training: refused, then ended as if undisturbed"


def test_damaged_files_are_refused(processes, flags, tmp_path):
    attempts, _ = drill_corruption(processes, flags, tmp_path, 2, "0")
    assert len(attempts) > 30
    assert not lost(attempts)
    found = {attempt.found for attempt in attempts}
    assert "plan: refused" in found
    assert any(text.startswith("calibration bank: noticed") for text in found)


def test_trouble_is_survived(processes, flags, tmp_path):
    attempts, _ = drill_trouble(processes, flags, tmp_path, 1, "1")
    assert len(attempts) == 2
    assert not lost(attempts)


def test_a_race_is_survived(processes, flags, tmp_path):
    attempts, _ = drill_races(processes, flags, tmp_path, 1, "0")
    assert len(attempts) == 1
    assert not lost(attempts)


def test_processes_end_as_they_do(processes, tmp_path):
    wrong = processes.run(Command(argv=("report", str(tmp_path))))
    assert wrong.is_clear_error
    assert wrong.last_line.startswith("autoqra report:")
    killed = processes.start(Command(argv=("report", str(tmp_path)))).ended(kill_after=0.0)
    assert (killed.code, killed.is_clear_error) == (-9, False)


def test_damage_changes_something():
    rng = random.Random(0)
    for content in (b"a", bytes(5) + b"x", bytes(range(256))):
        assert all(damage(content, rng).content != content for _ in range(100))


def test_losses_are_counted_and_told():
    attempts = [Attempt(case="kill 1", found="same"), Attempt(case="kill 2", found="other", defect="a trial")]
    outcome = PartOutcome(name="kills", attempts=attempts, seconds=1.0, figures={"stray_bytes": 0})
    assert outcome.to_dict(seed=3)["failures"] == [
        {"seed": 3, "case": "kill 2", "found": "other", "defect": "a trial"}
    ]
    assert outcome.to_dict(seed=3)["num_survived"] == 1
    assert "1 of 2 survived" in str(outcome)
    assert "LOST  kill 2: a trial" in str(outcome)


def test_the_recorded_drill_lost_nothing():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "drill.json"
    parts = json.loads(path.read_text())
    assert parts.keys() == {"kills", "disk", "corruption", "trouble", "races"}
    for part in parts.values():
        assert part["num_survived"] == part["num_tried"] == sum(part["found"].values())
        assert part["failures"] == []
    assert parts["kills"]["num_tried"] >= 50
