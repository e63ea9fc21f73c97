"""The search end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig

from peft_autoqra import AutoQRAConfig, AutoQRASearcher, BitRankPlan
from peft_autoqra.errors import CalibrationError, InvalidPlanError, MemoryBudgetError, SearchStateError
from peft_autoqra.evaluation.held_out import held_out_loss
from peft_autoqra.evaluation.sft import SFTEvaluator
from peft_autoqra.searcher import LOG_FILE
from peft_autoqra.trial import TrialStatus
from tests.tiny_data import token_dataset
from tests.tiny_searcher import tiny_searcher


@pytest.fixture
def make_searcher(tiny_llama, tmp_path):
    def make(output_dir: str = "out", train: Dataset | None = None, **changes) -> AutoQRASearcher:
        settings = {
            "bit_choices": [2, 3, 4, 8, 16],
            "granularity": "module",
            "num_calibration_sequences": 8,
            "num_eval_sequences": 8,
            "max_trials": 16,
            "cache_dir": str(tmp_path / "cache"),
        }
        data = (token_dataset(seed=0) if train is None else train, token_dataset(seed=1))
        return tiny_searcher(
            tiny_llama(), tmp_path / output_dir, data=data, recipe={"max_steps": 4}, **settings | changes
        )

    return make


def _losses(result):
    return [(trial.origin, trial.plan.digest, trial.fidelity, trial.loss) for trial in result.trials]


def test_search_keeps_the_budget_and_beats_or_equals_the_baselines(make_searcher):
    searcher = make_searcher()
    before = {name: value.clone() for name, value in searcher.setup.model.state_dict().items()}
    result = searcher.run()
    assert "qlora-4bit" in result.baselines
    assert all(trial.total_bytes <= result.budget.limit_bytes for trial in result.trials)
    best = result.baselines[result.best_baseline]
    assert result.winner == best or result.margin.is_better(result.num_searched)
    assert result.plan.memory.total_bytes <= result.budget.limit_bytes
    after = searcher.setup.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_saved_plan_builds_the_model_that_was_searched(make_searcher, tiny_llama):
    searcher = make_searcher()
    result = searcher.run()
    untrained = next(trial for trial in result.trials if trial.fidelity.num_steps == 0)
    bank = searcher.setup.calibration_bank(Path(searcher.config.cache_dir), show_progress=False)
    plan = untrained.plan.replace(calibration=bank.for_layers(untrained.plan))
    plan.save_pretrained(searcher.output_dir / "untrained")
    loaded = BitRankPlan.from_pretrained(searcher.output_dir / "untrained")
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=loaded))
    batches = searcher.setup.data.batches(searcher.setup.data.held_out, 8)
    assert held_out_loss(model, batches).mean == pytest.approx(untrained.loss, abs=1e-5)
    assert BitRankPlan.from_pretrained(searcher.output_dir / "plan") == result.plan
    summary = json.loads((searcher.output_dir / "search_result.json").read_text())
    assert summary["winner"]["loss"] == result.winner.loss


def test_a_second_run_repeats_no_trial_and_gives_the_same_result(make_searcher, monkeypatch):
    first = make_searcher().run()

    def fail(*_):
        raise AssertionError("a finished trial was run again")

    monkeypatch.setattr(SFTEvaluator, "evaluate", fail)
    second = make_searcher().run()
    assert _losses(second) == _losses(first)
    assert second.plan == first.plan


def test_an_interrupted_search_ends_like_an_uninterrupted_one(make_searcher, monkeypatch):
    whole = make_searcher("whole").run()
    evaluate, calls = SFTEvaluator.evaluate, []

    def interrupt(self, plan, fidelity):
        calls.append(plan)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(self, plan, fidelity)

    monkeypatch.setattr(SFTEvaluator, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_searcher("cut").run()
    monkeypatch.setattr(SFTEvaluator, "evaluate", evaluate)
    resumed = make_searcher("cut").run()
    assert _losses(resumed) == _losses(whole)


def test_failed_trials_are_recorded_and_the_search_goes_on(make_searcher, monkeypatch):
    trained = SFTEvaluator._trained

    def sometimes(self, plan, fidelity):
        if plan.average_rank > 3 and plan.quantizer.backend == "native":
            raise RuntimeError("out of memory")
        return trained(self, plan, fidelity)

    monkeypatch.setattr(SFTEvaluator, "_trained", sometimes)
    result = make_searcher().run()
    failed = [trial for trial in result.trials if trial.result.status is TrialStatus.FAILED]
    assert failed
    assert all("out of memory" in trial.result.error for trial in failed)
    assert result.winner.loss is not None


def test_nan_losses_are_failed_trials_and_all_failed_is_an_error(make_searcher, monkeypatch):
    monkeypatch.setattr(
        "peft_autoqra.evaluation.sft.held_out_loss",
        lambda *_: type("L", (), {"mean": float("nan"), "sequence_losses": ()}),
    )
    searcher = make_searcher()
    with pytest.raises(SearchStateError, match="the held-out loss is nan"):
        searcher.run()
    records = [json.loads(line) for line in (searcher.output_dir / LOG_FILE).read_text().splitlines()[1:]]
    results = [record["result"] for record in records if record["kind"] == "trial"]
    assert results
    assert all(result["status"] == "failed" for result in results)


def test_a_directory_of_another_search_is_refused(make_searcher):
    make_searcher().run()
    with pytest.raises(SearchStateError, match="train_dataset"):
        make_searcher(train=token_dataset(seed=0, num_sequences=25)).run()
    with pytest.raises(SearchStateError, match="num_seeds: 2 there, 3 now"):
        make_searcher(num_seeds=3).run()
    with pytest.raises(SearchStateError, match="holds a search already"):
        make_searcher(resume=False).run()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"memory_budget": 1000}, MemoryBudgetError, "smallest plan"),
        ({"memory_budget": "lots"}, MemoryBudgetError, "'lots'"),
        ({"bit_choices": [5]}, InvalidPlanError, "bits=5"),
        ({"granularity": "tensor"}, InvalidPlanError, "'tensor'"),
        ({"target_modules": ["nothing"]}, InvalidPlanError, "matches no linear layer"),
        ({"rank_choices": [0]}, InvalidPlanError, "no rank above 0"),
        ({"train": Dataset.from_dict({"input_ids": []})}, CalibrationError, "train_dataset is empty"),
    ],
)
def test_bad_settings_are_refused_before_work(make_searcher, changes, error, message):
    with pytest.raises(error, match=message):
        make_searcher(**changes)


@pytest.mark.parametrize("granularity", ["layer", "block", "fused"])
def test_modules_of_a_group_get_the_same_choice(make_searcher, granularity):
    searcher = make_searcher(granularity=granularity, max_trials=5)
    plan = searcher.run().plan
    for group in searcher.setup.space.groups:
        assert len({plan[module] for module in group.modules}) == 1


def test_budget_in_which_qlora_does_not_fit(make_searcher):
    searcher = make_searcher(memory_budget="0.5*qlora-4bit-r16")
    result = searcher.run()
    assert all(trial.total_bytes <= result.budget.limit_bytes for trial in result.trials)


def test_estimate_trains_nothing(make_searcher):
    searcher = make_searcher()
    before = {name: value.clone() for name, value in searcher.setup.model.state_dict().items()}
    estimate = searcher.estimate()
    assert estimate.full_seconds > 0
    assert 0 < estimate.ladder.calibration_cost < estimate.max_cost
    assert 0 < estimate.smallest_bytes <= estimate.budget_bytes
    assert not Path(searcher.output_dir).exists()
    assert all(torch.equal(value, before[name]) for name, value in searcher.setup.model.state_dict().items())
    result = searcher.run()
    assert len(result.trials) <= estimate.ladder.spending.max_trials
    assert result.cost <= estimate.max_cost


def test_paired_margin_of_the_winner(make_searcher):
    result = make_searcher().run()
    for summary, compared in zip(result.summary()["baselines"].values(), result.baselines.values(), strict=True):
        pairs = list(zip(result.winner.trials, compared.trials, strict=False))
        losses = [[np.array(trial.result.sequence_losses) for trial in pair] for pair in pairs]
        expected = np.mean([first - second for first, second in losses])
        assert summary["winner_minus_this"]["mean"] == pytest.approx(expected)
        assert summary["winner_minus_this"]["num_seeds"] == len(pairs)


def test_a_budget_without_room_for_an_adapter_is_refused_at_once(make_searcher):
    searcher = make_searcher()
    problem = searcher.setup.problem_with(searcher.setup.zero_table())
    with pytest.raises(MemoryBudgetError, match=f"{problem.smallest_trainable_bytes:,}"):
        make_searcher(memory_budget=str(problem.smallest_bytes))
    tight = make_searcher("tight", memory_budget=str(problem.smallest_trainable_bytes))
    assert tight.run().plan.memory.total_bytes == problem.smallest_trainable_bytes


def test_searches_with_other_choices_share_a_cache(make_searcher):
    first = make_searcher("one")
    first.run()
    make_searcher("ranks", rank_choices=[0, 1], bit_choices=[3, 8]).run()
    make_searcher("bits", bit_choices=[3, 8]).run()
    folders = [path.name.partition("-")[0] for path in Path(first.config.cache_dir).iterdir() if path.is_dir()]
    assert sorted(folders) == ["bank", "bank", "statistics"]  # one for each largest rank


def test_a_search_with_error_feedback_gives_a_plan_that_carries_its_codes(make_searcher, tiny_llama):
    searcher = make_searcher("gptq", quantizer="gptq", bit_choices=[3, 4])
    result = searcher.run()
    searched = result.baselines["allocation"].first.plan
    bank = searcher.setup.calibration_bank(Path(searcher.config.cache_dir), show_progress=False)
    plan = searched.replace(calibration=bank.for_layers(searched))
    assert plan.quantizer.backend == "gptq"
    for name, layer in plan.items():
        assert np.array_equal(plan.calibration.codes[name].codes, bank.entries[name, layer.bits].codes.codes)


def test_keeping_dense_weights_changes_no_result(make_searcher):
    results = [make_searcher(str(choice), materialize=choice).run() for choice in (False, True)]
    losses = [[trial.loss for trial in result.trials] for result in results]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_cache_is_made_again(make_searcher, damage):
    whole = make_searcher("whole").run()
    searcher = make_searcher("again")
    file = next(Path(searcher.config.cache_dir).glob("*/3bit/*.safetensors"))
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    assert _losses(searcher.run()) == _losses(whole)


def test_an_in_process_model_needs_a_tokenizer(tiny_llama):
    data = token_dataset(seed=0)
    with pytest.raises(CalibrationError, match="processing_class"):
        AutoQRASearcher(tiny_llama(), train_dataset=data, eval_dataset=data, args=SFTConfig(bf16=False, use_cpu=True))
