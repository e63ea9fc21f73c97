"""The log of a search: what survives a kill, and what it refuses to continue."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_autoqra.errors import SearchStateError, StorageError
from peft_autoqra.plan import BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.trial import Fidelity, Trial, TrialResult, TrialStatus
from peft_autoqra.trial_log import Asked, Finished, TrialLog
from tests.full_disk import full_disk

IDENTITY = {"model": "me/base", "seed": 0, "bit_choices": (2, 4), "budget": {"bytes": 1000}}
FIDELITY = Fidelity(num_steps=8, num_eval_sequences=32, seed=1)


def make_trial(number: int, *, bits: int = 4, **changes: Any) -> Trial:
    plan = BitRankPlan(
        {"layers.0.q": LayerPlan(bits, 4), "layers.1.q": LayerPlan(16, 0)},
        shapes={"layers.0.q": (32, 64)},
        quantizer=QuantizerSettings(group_size=32),
        initialization="compensate",
    )
    result = TrialResult(
        status=TrialStatus.COMPLETED,
        seconds=1.5,
        loss=2.0 + number / 3,
        sequence_losses=(1.5, 1 / 3),
        metrics={"accuracy": 0.5},
    )
    arguments = {
        "number": number,
        "origin": "evolution",
        "plan": plan,
        "fidelity": FIDELITY,
        "total_bytes": 900,
        "result": result,
    }
    return Trial(**(arguments | changes))


def make_failed_trial(number: int, *, bits: int = 2) -> Trial:
    failed = TrialResult(status=TrialStatus.FAILED, seconds=0.1, error="the loss is NaN")
    return make_trial(number, bits=bits, result=failed)


def test_trials_come_back_equal(tmp_path: Path) -> None:
    trials = [make_trial(0), make_failed_trial(1), make_trial(2, bits=8, fidelity=Fidelity(0, 32))]
    log = TrialLog(tmp_path / "new" / "trials.jsonl", IDENTITY)
    for trial in trials:
        log.add(trial)
    reopened = TrialLog(log.path, IDENTITY)
    assert reopened.trials == log.trials == trials
    assert [trial.plan.shapes for trial in reopened.trials] == [trial.plan.shapes for trial in trials]
    assert reopened.trials[0].loss == 2.0
    assert reopened.trials[1].result.status is TrialStatus.FAILED


def test_a_trial_is_on_disk_when_add_returns(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    for number in range(3):
        log.add(make_trial(number, bits=(2, 4, 8)[number]))
        lines = log.path.read_text().splitlines()
        assert len(lines) == number + 2
        assert json.loads(lines[-1])["number"] == number


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    events = [Asked(3), make_trial(2), Asked(1), make_failed_trial(0), Finished(), make_trial(1)]
    for event in events:
        log.add(event)
    reopened = TrialLog(log.path, IDENTITY)
    assert reopened.events == log.events == events
    assert [trial.number for trial in reopened.trials] == [2, 0, 1]


def test_a_trial_without_a_result_is_not_logged(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    content = log.path.read_bytes()
    with pytest.raises(ValueError, match="Trial 3 has no result"):
        log.add(make_trial(3, result=None))
    assert log.path.read_bytes() == content
    assert log.events == []


def test_a_log_of_the_format_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text(json.dumps({"kind": "search", "version": 1, "identity": IDENTITY}) + "\n")
    with pytest.raises(SearchStateError, match="no trial log of format 2; use another output_dir"):
        TrialLog(path, IDENTITY)


def test_numpy_numbers_can_be_logged(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    result = TrialResult(
        status=TrialStatus.COMPLETED, seconds=1.0, loss=np.float64(2.5), sequence_losses=(np.float64(0.5),)
    )
    log.add(make_trial(0, result=result))
    assert TrialLog(log.path, IDENTITY).trials[0].loss == 2.5


def test_every_cut_of_the_last_line_loses_that_trial_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_autoqra.trial_log.time", lambda: 1000.0)
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    trials = [make_trial(0), make_failed_trial(1)]
    log.add(trials[0])
    complete = log.path.stat().st_size
    log.add(trials[1])
    content = log.path.read_bytes()
    for length in range(complete, len(content), 7):
        log.path.write_bytes(content[:length])
        resumed = TrialLog(log.path, IDENTITY)
        assert resumed.trials == trials[:1]
        resumed.add(trials[1])
        assert log.path.read_bytes() == content


def test_a_kill_while_the_header_was_written(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    TrialLog(path, IDENTITY)
    header = path.read_bytes()
    for length in range(len(header)):
        path.write_bytes(header[:length])
        assert TrialLog(path, IDENTITY).trials == []
        assert path.read_bytes() == header


def test_opening_again_writes_nothing(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    log.add(make_trial(0))
    content = log.path.read_bytes()
    TrialLog(log.path, IDENTITY)
    assert log.path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"model": "me/other"}, "model: 'me/base' there, 'me/other' now"),
        ({"budget": {"bytes": 999}}, "budget"),
        ({"bit_choices": (2, 4, 8)}, "bit_choices"),
        ({"new_setting": True}, "new_setting: None there, True now"),
    ],
)
def test_the_log_of_another_search(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    log.add(make_trial(0))
    content = log.path.read_bytes()
    with pytest.raises(SearchStateError, match=f"another search.*{message}.*another output_dir"):
        TrialLog(log.path, IDENTITY | changes)
    assert log.path.read_bytes() == content


def test_the_log_of_another_search_with_a_partial_last_line_is_left_as_it_is(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    log.add(make_trial(0))
    content = log.path.read_bytes()[:-5]
    log.path.write_bytes(content)
    with pytest.raises(SearchStateError, match="another search"):
        TrialLog(log.path, IDENTITY | {"seed": 1})
    assert log.path.read_bytes() == content


def test_not_resuming_refuses_an_existing_log(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY, resume=False)
    log.add(make_trial(0))
    content = log.path.read_bytes()
    with pytest.raises(SearchStateError, match="holds a search already"):
        TrialLog(log.path, IDENTITY, resume=False)
    assert log.path.read_bytes() == content


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "trial"},
        {"kind": "search", "version": 99, "identity": {}},
        {"kind": "search", "version": 1},
        {"kind": "search", "version": 1, "identity": 3},
        [1, 2],
        "text",
        None,
    ],
)
def test_a_file_that_is_no_log(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text(json.dumps(header) + "\n")
    with pytest.raises(SearchStateError, match=r"trials\.jsonl"):
        TrialLog(path, IDENTITY)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        "null",
        "[]",
        "",
        '{"kind": "trial"}',
        '{"kind": "asked"}',
        '{"kind": "asked", "num": 0}',
        '{"kind": "asked", "num": "3"}',
        '{"kind": "told"}',
        '{"kind": "trial", "plan": {"layers": {"a": [5, 1]}}, "result": {}}',
        '{"kind": "trial", "plan": {"layers": []}, "result": {}}',
        "\\ud800",
    ],
)
def test_a_damaged_line_before_the_last_is_named(tmp_path: Path, line: str) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    log.add(make_trial(0))
    lines = log.path.read_text().splitlines()
    log.path.write_text("\n".join([lines[0], line, lines[1]]) + "\n")
    with pytest.raises(SearchStateError, match=r"Line 2 of .*trials\.jsonl is damaged"):
        TrialLog(log.path, IDENTITY)


def test_a_loss_that_is_no_number_is_kept_as_such(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    result = TrialResult(status=TrialStatus.FAILED, seconds=0.0, metrics={"loss": math.nan}, error="the loss is NaN")
    log.add(make_trial(0, result=result))
    assert math.isnan(TrialLog(log.path, IDENTITY).trials[0].result.metrics["loss"])


def test_a_changed_digit_is_noticed(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    log.add(make_trial(0))
    text = log.path.read_text()
    log.path.write_text(text.replace('"loss": 2.0', '"loss": 1.0'))
    with pytest.raises(SearchStateError, match=r"Line 2 of .* is damaged .*wrong checksum"):
        TrialLog(log.path, IDENTITY)


def test_a_log_without_checksums_goes_on(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    log.add(make_trial(0))
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    log.path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "checksum"}) + "\n" for r in records))
    assert TrialLog(log.path, IDENTITY).trials == log.trials


def test_a_full_disk_loses_the_trial_that_was_told_last_only(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", IDENTITY)
    log.add(make_trial(0))
    with (
        full_disk(log.path.stat().st_size + 20),
        pytest.raises(StorageError, match=r"trials\.jsonl cannot be written"),
    ):
        log.add(make_trial(1))
    again = TrialLog(log.path, IDENTITY)
    assert again.trials == log.trials == [make_trial(0)]
    again.add(make_trial(1))
    assert TrialLog(log.path, IDENTITY).trials == [make_trial(0), make_trial(1)]
