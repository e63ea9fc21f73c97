"""Limits and misfortunes of a whole search on a tiny model, and searches driven from outside."""

from __future__ import annotations

import json
import time

import pytest
import torch

from peft_autoqra import AutoQRASearcher, BitRankPlan
from peft_autoqra.errors import SearchStateError
from peft_autoqra.evaluation.sft import SFTEvaluator
from peft_autoqra.trial import Trial, TrialResult, TrialStatus
from tests.tiny_evaluator import model_state
from tests.tiny_searcher import tiny_searcher


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_searcher(tiny_llama, tmp_path, cache_dir):
    def make(name="out", **changes) -> AutoQRASearcher:
        return tiny_searcher(tiny_llama(), tmp_path / name, cache_dir=str(cache_dir), **changes)

    return make


def sleep():
    time.sleep(60)


def run_out_of_memory():
    torch.empty(2**50, dtype=torch.uint8)


def fail():
    raise ZeroDivisionError("as ordered")


@pytest.mark.parametrize(
    ("misfortune", "error"),
    [(sleep, "TimeLimitExceeded"), (run_out_of_memory, "Out of memory"), (fail, "ZeroDivisionError: as ordered")],
)
def test_a_trial_goes_wrong_and_the_search_goes_on(make_searcher, monkeypatch, misfortune, error):
    """In the forward pass of the second trial, with its adapters in place."""
    searcher = make_searcher(max_trial_seconds=4.0 if misfortune is sleep else None)
    before = model_state(searcher.setup.model)
    evaluate, num_calls = SFTEvaluator.evaluate, 0

    def evaluate_unluckily(self, plan, fidelity):
        nonlocal num_calls
        num_calls += 1
        if num_calls != 2:
            return evaluate(self, plan, fidelity)
        layer = searcher.setup.model.model.layers[-1]
        hook = layer.register_forward_pre_hook(lambda *_: misfortune())
        try:
            return evaluate(self, plan, fidelity)
        finally:
            hook.remove()

    monkeypatch.setattr(SFTEvaluator, "evaluate", evaluate_unluckily)
    result = searcher.run()
    failed = [trial for trial in result.trials if trial.result.status is TrialStatus.FAILED]
    assert [trial.number for trial in failed] == [1]
    assert error in failed[0].result.error
    assert len(result.trials) == 9
    assert result.winner.loss is not None
    assert json.loads((searcher.output_dir / "search_result.json").read_text())["num_failed"] == 1
    assert model_state(searcher.setup.model) == before


def test_max_cost_is_kept(make_searcher):
    ladder = make_searcher(max_trials=None).setup.ladder()
    max_cost = ladder.calibration_cost + 9.5 * ladder.spending.level_costs[-1]
    result = make_searcher(max_trials=None, max_cost=max_cost).run()
    assert result.cost == pytest.approx(ladder.calibration_cost + sum(trial.cost for trial in result.trials))
    assert result.cost <= result.max_cost == max_cost
    assert result.cost > 0.7 * max_cost
    assert result.winner.loss is not None


def test_max_seconds_ends_exploring_then_everything(make_searcher, monkeypatch):
    """Trials of 0.1 s: after 70% of the time only finalists are confirmed."""

    def evaluate(self, plan, fidelity):
        time.sleep(0.1)
        loss = 2.0 + plan.average_bits / 100
        return TrialResult(status=TrialStatus.COMPLETED, seconds=0.1, loss=loss, sequence_losses=(loss,) * 4)

    monkeypatch.setattr(SFTEvaluator, "evaluate", evaluate)
    searcher = make_searcher(max_seconds=4.0, max_trials=None, num_seeds=3)
    start = time.perf_counter()
    result = searcher.run()
    assert time.perf_counter() - start < 30  # all else included
    events = [json.loads(line) for line in (searcher.output_dir / "trials.jsonl").read_text().splitlines()]
    finished = [number for number, event in enumerate(events) if event["kind"] == "finished"]
    assert len(finished) == 1
    later = [event["origin"].partition(":")[0] for event in events[finished[0] :] if event["kind"] == "trial"]
    assert set(later) <= {"confirmation"}
    assert sum(trial.result.seconds for trial in result.trials) <= 4.2


def test_learning_rates_and_which_of_them_won(make_searcher):
    result = make_searcher(learning_rate_factors=[1.0, 2.0], max_trials=18).run()
    tops = [trial for trial in result.trials if trial.fidelity.num_steps]
    assert {trial.fidelity.learning_rate_factor for trial in tops} == {1.0, 2.0}
    won = result.winner.first.fidelity.learning_rate_factor
    assert result.summary()["winner"]["learning_rate_factor"] == won
    assert result.plan.provenance["learning_rate_factor"] == won
    same_plan = [trial for trial in tops if trial.plan == result.winner.first.plan and trial.fidelity.seed == 0]
    assert {trial.fidelity.learning_rate_factor for trial in same_plan} == {1.0, 2.0}
    assert min(same_plan, key=lambda trial: trial.loss).fidelity.learning_rate_factor == won


def loss_of(plan: BitRankPlan) -> float:
    return 3.0 - plan.average_rank / 100


@pytest.mark.parametrize("with_sequences", [True, False])
def test_a_scheduler_asks_and_tells(make_searcher, with_sequences):
    """Plain records go out, results come back in another order."""
    searcher = make_searcher(max_trials=12)
    with searcher.opened():
        while batch := searcher.ask(3):
            sent = [json.dumps(trial.to_dict()) for trial in batch]
            for record in reversed(sent):
                trial = Trial.from_dict(json.loads(record))
                loss = loss_of(trial.plan)
                sequences = (loss - 0.1, loss + 0.1) if with_sequences else ()
                result = TrialResult(status=TrialStatus.COMPLETED, seconds=1.0, loss=loss, sequence_losses=sequences)
                searcher.tell(trial, TrialResult.from_dict(json.loads(json.dumps(result.to_dict()))))
        result = searcher.result()
    assert len(result.trials) <= 12
    assert result.winner.loss == pytest.approx(min(t.loss for t in result.trials if t.fidelity.num_steps), abs=1e-6)
    assert BitRankPlan.from_pretrained(searcher.output_dir / "plan") == result.plan
    assert result.summary()["baselines"]
    assert result.verdict


def test_a_trial_evaluated_in_this_process_is_what_run_evaluates(make_searcher):
    whole = make_searcher("whole", max_trials=4).run()
    searcher = make_searcher("own", max_trials=4)
    with searcher.opened():
        evaluator = searcher.setup.evaluator(searcher.calibrate())
        while batch := searcher.ask():
            for trial in batch:
                sent = Trial.from_dict(json.loads(json.dumps(trial.to_dict())))
                searcher.tell(trial, evaluator.evaluate(sent.plan, sent.fidelity))
        searcher.setup.resident.restore()
        result = searcher.result()
    assert [trial.loss for trial in result.trials] == [trial.loss for trial in whole.trials]
    assert result.plan == whole.plan


def test_only_an_opened_searcher_can_be_asked(make_searcher):
    searcher = make_searcher()
    result = TrialResult(status=TrialStatus.FAILED, seconds=0.0, error="none")
    with searcher.opened():
        (trial,) = searcher.ask()
        with pytest.raises(SearchStateError, match="No trial of 2 steps was run yet"):
            searcher.result()
    for call in (searcher.ask, searcher.result, lambda: searcher.tell(trial, result)):
        with pytest.raises(SearchStateError, match=r"with searcher\.opened\(\):"):
            call()


def test_trials_that_are_not_under_way_are_refused(make_searcher):
    searcher = make_searcher()
    result = TrialResult(status=TrialStatus.COMPLETED, seconds=0.0, loss=2.0, sequence_losses=(2.0, 2.0))
    with searcher.opened():
        (trial,) = searcher.ask()
        searcher.tell(trial, result)
        for wrong in (trial, Trial.from_dict(trial.to_dict() | {"number": 77})):
            with pytest.raises(SearchStateError, match="not under way"):
                searcher.tell(wrong, result)


def test_a_second_searcher_on_the_same_directory_is_refused(make_searcher):
    first, second = make_searcher(), make_searcher()
    with first.opened():
        with pytest.raises(SearchStateError, match="Another search is running"), second.opened():
            pytest.fail("two searches in one directory")
        with pytest.raises(SearchStateError, match="Another search is running"):
            second.run()
    with second.opened():
        assert second.ask()
