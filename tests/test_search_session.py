"""Ask and tell over a log: killed anywhere, resumed, and used by schedulers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from peft_autoqra.errors import SearchStateError
from peft_autoqra.sealed_record import sealed, unsealed
from peft_autoqra.search_session import QLORA
from peft_autoqra.trial import Trial, TrialResult, TrialStatus
from peft_autoqra.trial_log import Finished, TrialLog
from tests.tiny_session import SEED, evaluate, make_ladder, session_opener, session_setup


@pytest.fixture(autouse=True)
def the_same_logs_at_any_time(monkeypatch):
    monkeypatch.setattr("peft_autoqra.trial_log.time", lambda: 1000.0)


@pytest.fixture(scope="module")
def setup(tiny_llama, tmp_path_factory):
    return session_setup(tiny_llama(), tmp_path_factory.mktemp("sft"))


@pytest.fixture
def open_session(setup, tmp_path):
    return session_opener(setup, tmp_path)


def go_on(session, num=1):
    """Ask for some, tell them in the opposite order."""
    while not session.is_done:
        for trial in reversed(session.ask(num)):
            session.tell(trial, evaluate(trial))
    return session


def trials_of(session):
    return [(t.number, t.origin, t.plan, t.fidelity, t.loss, t.cost) for t in session.log.trials]


def test_killed_at_every_line_of_the_log_it_goes_on_the_same(open_session):
    """The next line is the same after every kill, hence all that follow are."""
    whole = go_on(open_session("whole"))
    lines = whole.log.path.read_bytes().splitlines(keepends=True)
    assert {trial.origin for trial in whole.log.trials} >= {"evolution", "trust_region", "confirmation"}
    for kept in range(1, len(lines) + 1):
        session = open_session(f"cut{kept}")
        session.log.path.write_bytes(b"".join(lines[:kept]))
        resumed = open_session(f"cut{kept}")
        for trial in resumed.ask():
            resumed.tell(trial, evaluate(trial))
        written = resumed.log.path.read_bytes()
        assert len(written) > sum(map(len, lines[:kept])) or resumed.is_done
        assert b"".join(lines).startswith(written)
    assert resumed.decision() == whole.decision()


def test_killed_among_three_under_way_it_ends_the_same(open_session):
    """Whichever of three results were told before the kill, the others are told after it."""
    whole = go_on(open_session("whole"), 3)
    lines = whole.log.path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        if b'"kind": "trial"' not in lines[kept - 1]:
            continue
        session = open_session(f"cut{kept}")
        session.log.path.write_bytes(b"".join(lines[:kept]))
        resumed = go_on(open_session(f"cut{kept}"), 3)
        assert resumed.log.path.read_bytes() == whole.log.path.read_bytes()
        assert resumed.decision() == whole.decision()


def test_three_under_way_all_the_time_and_a_kill(open_session):
    """A scheduler that keeps three under way, loses its processes with the search, and tells in odd orders."""

    def work(session, rng, num_tells):
        running = []
        while not session.is_done and num_tells:
            while len(running) < 3 and (new := session.ask(3 - len(running))):
                running += new
            if not running:
                break
            trial = running.pop(rng.integers(len(running)))
            session.tell(trial, evaluate(trial))
            num_tells -= 1

    work(open_session(), np.random.default_rng(0), 7)
    replayed = open_session()
    assert len(replayed.log.trials) == 7
    again = open_session("again")
    again.log.path.write_bytes(replayed.log.path.read_bytes())
    again = open_session("again")
    for session in (replayed, again):
        work(session, np.random.default_rng(1), -1)
    assert trials_of(replayed) == trials_of(again)
    numbers = [trial.number for trial in replayed.log.trials]
    assert sorted(numbers) == list(range(len(numbers)))


def test_open_trials_are_given_again_by_themselves(open_session):
    asked = open_session().ask(3)
    resumed = open_session()
    assert resumed.ask(2) == asked[:2]
    assert resumed.ask(2) == asked[2:]
    assert all(trial.number > 2 for trial in resumed.ask(2))


def test_an_open_trial_may_be_told_without_being_asked_for_again(open_session):
    asked = open_session().ask(3)
    resumed = open_session()
    resumed.tell(asked[1], evaluate(asked[1]))
    assert resumed.ask(3) == [asked[0], asked[2]]


def test_trials_through_json_in_another_order(open_session):
    session = open_session()
    asked = session.ask(3)
    sent = [json.loads(json.dumps(trial.to_dict())) for trial in asked]
    for record in reversed(sent):
        trial = Trial.from_dict(record)
        result = TrialResult.from_dict(json.loads(json.dumps(evaluate(trial).to_dict())))
        session.tell(trial, result)
    assert [trial.number for trial in session.log.trials] == [2, 1, 0]
    assert all(trial.plan.memory is not None for trial in session.log.trials)


def test_what_is_not_under_way_is_refused(open_session):
    session = open_session()
    first, second = session.ask(2)
    result = evaluate(first)
    session.tell(first, result)
    content = session.log.path.read_bytes()
    wrong = [
        first,  # told twice
        replace(second, number=99),
        replace(second, number=-1),
        replace(second, plan=first.plan),
    ]
    for trial in wrong:
        with pytest.raises(SearchStateError, match="not under way"):
            session.tell(trial, result)
    assert session.log.path.read_bytes() == content
    session.tell(second, result)


def test_a_log_of_another_version_is_refused(open_session, tmp_path):
    session = open_session()
    (trial,) = session.ask()
    session.tell(trial, evaluate(trial))
    other = TrialLog(tmp_path / "log.jsonl", {"search": 1}).path
    lines = other.read_text().splitlines()
    record = unsealed(json.loads(lines[-1]))
    record["number"] = 4
    other.write_text("\n".join([*lines[:-1], json.dumps(sealed(record))]) + "\n")
    with pytest.raises(SearchStateError, match=r"Trial 4 of .*is not one that this search would ask for"):
        open_session()


def test_finishing_is_remembered(open_session):
    session = open_session()
    for _ in range(4):
        (trial,) = session.ask()
        session.tell(trial, evaluate(trial))
    session.finish()
    assert session.log.events[-1] == Finished()
    rest = go_on(open_session()).log.trials[4:]
    assert {trial.origin.partition(":")[0] for trial in rest} == {"confirmation"}


def test_learning_rates_and_seeds_are_in_the_fidelity(open_session):
    session = go_on(open_session("rates", make_ladder(20, (1.0, 2.0))))
    tops = [trial.fidelity for trial in session.log.trials if trial.fidelity.num_steps]
    assert {fidelity.learning_rate_factor for fidelity in tops} == {1.0, 2.0}
    assert {fidelity.seed for fidelity in tops} == {SEED, SEED + 1}
    decision = session.decision()
    confirmed = session.trials_of(decision.winner, decision.variant)
    assert [trial.fidelity.seed for trial in confirmed] == [SEED, SEED + 1]
    assert len({trial.fidelity.learning_rate_factor for trial in confirmed}) == 1


def test_costs_are_booked_with_calibration(open_session):
    session = go_on(open_session())
    costs = [trial.cost for trial in session.log.trials]
    assert session.cost == pytest.approx(0.5 + sum(costs))
    assert len(costs) <= 13


def test_baselines_have_names(open_session, setup):
    session = open_session()
    first = session.ask(3)
    assert list(session.baselines()) == ["allocation", "uniform", QLORA]
    assert [trial.origin for trial in first] == ["baseline", "baseline", f"baseline:{QLORA}"]
    assert first[2].plan.quantizer.backend == "bitsandbytes"
    assert all(trial.total_bytes <= setup.budget.limit_bytes for trial in first)


def test_all_failed_names_the_causes(open_session):
    session = open_session("failed", make_ladder(5))
    while not session.is_done:
        for trial in session.ask():
            session.tell(trial, TrialResult(status=TrialStatus.FAILED, seconds=0.0, error="no luck"))
    with pytest.raises(SearchStateError, match=r"No plan came through all its trials of 8 steps: \{'no luck'\}"):
        session.decision()
