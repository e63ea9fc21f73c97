"""Whole searches on a tiny model for something else than the held-out loss."""

from __future__ import annotations

import json
from importlib.util import find_spec

import datasets
import numpy as np
import pytest

from peft_autoqra import AutoQRASearcher, BitRankPlan
from peft_autoqra.commands.search import result_text
from peft_autoqra.errors import EvaluationError, SearchStateError
from peft_autoqra.evaluation.objective import GENERATED_TOKEN
from peft_autoqra.evaluation.sft import mean_length
from tests.evaluation.harness_task import write_task
from tests.evaluation.tiny_questions import questions
from tests.tiny_data import token_dataset
from tests.tiny_searcher import tiny_searcher

pytestmark = pytest.mark.usefixtures("metric_modules")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_searcher(tiny_llama, tmp_path, cache_dir):
    def make(*, eval_dataset=None, judge=None, name="out", **changes) -> AutoQRASearcher:
        return tiny_searcher(
            tiny_llama(),
            tmp_path / name,
            data=(questions(seed=1), eval_dataset or questions(num=10)),
            recipe={"learning_rate": 1e-2},
            judge=judge,
            cache_dir=str(cache_dir),
            **{"num_eval_sequences": 8} | changes,
        )

    return make


def test_accuracy(make_searcher):
    searcher = make_searcher(objective="accuracy")
    result = searcher.run()
    for trial in result.trials:
        values = trial.result.sequence_losses
        assert len(values) == 8
        assert trial.loss == pytest.approx(-trial.result.metrics["accuracy"]) == pytest.approx(np.mean(values))
        np.testing.assert_allclose(values, np.round(values), atol=1e-9)  # right or wrong
        assert trial.result.metrics["held_out_loss"] > 0
    top = [trial.result.metrics["accuracy"] for trial in result.trials if trial.fidelity.num_steps]
    assert max(top) > 0
    summary = json.loads((searcher.output_dir / "search_result.json").read_text())
    assert summary["objective"] == {"name": "accuracy", "greater_is_better": True, "unit": ""}
    assert summary["winner"]["loss"] == result.winner.loss
    assert summary["winner"]["held_out_loss"] > 0
    assert "nats" not in result.verdict
    provenance = BitRankPlan.from_pretrained(searcher.output_dir / "plan").provenance
    assert provenance["objective"] == summary["objective"]
    assert provenance["objective_value"] == pytest.approx(-result.winner.loss)
    assert provenance["held_out_loss"] == pytest.approx(summary["winner"]["held_out_loss"])
    text = result_text(result, searcher.output_dir)
    assert "accuracy: on held-out examples, more is better, after 2 steps" in text
    assert f"{-result.winner.loss:.4f}" in text
    card = (searcher.output_dir / "plan" / "README.md").read_text()
    assert f"| chosen for | accuracy: {-result.winner.loss:.4f} |" in card
    assert "![Accuracy against memory" in card
    assert "| plan | memory | accuracy minus the winner's | 95% interval |" in card


def test_a_function_goes_on_where_it_was_and_another_one_is_refused(make_searcher):
    def distance(model, tokenizer, examples):
        weight = model.get_output_embeddings().weight
        return [float(weight.sum()) + len(row["prompt"]) for row in examples]

    def other(model, tokenizer, examples):
        return [0.0 for _ in examples]

    first = make_searcher(judge=distance, max_trials=4).run()
    assert [trial.result.metrics["distance"] for trial in first.trials] == [trial.loss for trial in first.trials]
    again = make_searcher(judge=distance, max_trials=4)
    with again.opened():
        assert not again.ask()
        assert again.result().winner.loss == first.winner.loss
    with pytest.raises(SearchStateError, match="objective"):
        make_searcher(judge=other, max_trials=4).run()


def test_costs_count_what_judging_takes(make_searcher):
    plain, generated = make_searcher(), make_searcher(objective="exact_match", max_new_tokens=4)
    prompts = [len(row["prompt"].split()) for row in questions(num=10)]
    judged = np.mean(prompts) + 4 * GENERATED_TOKEN
    assert generated.setup.costs.eval_tokens == pytest.approx(plain.setup.costs.eval_tokens + judged)
    assert plain.setup.costs.eval_tokens == mean_length(plain.setup.data.held_out)
    assert generated.setup.costs.scoring(8) > plain.setup.costs.scoring(8)


def test_a_trial_whose_figure_is_not_finite_has_failed(make_searcher):
    result_of = iter([[1.0] * 8, [float("nan")] * 8])

    def fickle(model, tokenizer, examples):
        return next(result_of)

    searcher = make_searcher(judge=fickle)
    with searcher.opened(), searcher.evaluator() as evaluator:
        (trial,) = searcher.ask()
        assert evaluator.evaluate(trial.plan, trial.fidelity).loss == 1.0
        assert "fickle is nan" in evaluator.evaluate(trial.plan, trial.fidelity).error


@pytest.mark.parametrize("objective", ["accuracy", "exact_match"])
def test_data_without_completions_is_refused_before_anything_is_loaded(make_searcher, monkeypatch, objective):
    monkeypatch.setattr("peft_autoqra.searcher.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(EvaluationError, match="no completion"):
        make_searcher(eval_dataset=token_dataset(seed=1), objective=objective)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_a_task_of_the_harness(make_searcher, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    result = make_searcher(objective=f"lm_eval:{write_task(tmp_path)}", max_trials=4).run()
    assert result.objective.name == "pick acc"
    assert not [trial.result.error for trial in result.trials if trial.result.error]
    assert all(trial.result.metrics["pick acc"] == -trial.loss for trial in result.trials)
