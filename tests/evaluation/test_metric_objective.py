"""Metrics of the `evaluate` library from scripts and classes, against scikit-learn and by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from peft_autoqra.errors import EvaluationError
from peft_autoqra.evaluation.answers import generated_texts, likeliest_choices
from peft_autoqra.evaluation.builtin_metrics import ExactMatch
from peft_autoqra.evaluation.completions import Tokenizing, read_completions, with_choices
from peft_autoqra.evaluation.metric_objective import MetricObjective
from peft_autoqra.evaluation.named_objective import make_objective
from peft_autoqra.evaluation.objective import GENERATED_TOKEN, HeldOutExamples
from tests.evaluation.tiny_questions import DISTANCE_SCRIPT, F1_SCRIPT, questions, write_script
from tests.tiny_data import word_tokenizer

pytestmark = pytest.mark.usefixtures("metric_modules")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture
def data():
    return HeldOutExamples(questions(), word_tokenizer(), batch_size=4, max_length=32, mean_tokens=6.0)


@pytest.fixture
def labels(model, data):
    """Predicted and right ones."""
    completions = with_choices(read_completions(data.examples))
    predicted = likeliest_choices(model, completions, Tokenizing(data.processing_class, 32), 4)
    return np.array(predicted), np.array([one.label for one in completions])


def test_accuracy_is_that_of_scikit_learn(model, data, labels):
    predicted, right = labels
    score = make_objective("accuracy").score(model, data, 10)
    assert score.value == pytest.approx(accuracy_score(right[:10], predicted[:10]))
    np.testing.assert_allclose(score.example_values, predicted[:10] == right[:10], atol=1e-9)


def test_a_script_that_is_no_mean_over_examples(model, data, labels, tmp_path):
    predicted, right = labels
    objective = make_objective(write_script(tmp_path, "macro_f1", F1_SCRIPT) + ":f1")
    assert objective.info.greater_is_better
    score = objective.score(model, data, 99)
    assert score.value == pytest.approx(f1_score(right, predicted, average="macro", zero_division=0.0))
    assert len(score.example_values) == 12
    again = pickle.loads(pickle.dumps(objective))
    assert again.identity == objective.identity
    assert again.score(model, data, 99) == score


def test_a_script_on_written_text_where_less_is_better(model, data, tmp_path):
    objective = make_objective(write_script(tmp_path, "distance", DISTANCE_SCRIPT), max_new_tokens=3)
    assert not objective.info.greater_is_better
    completions = read_completions(data.examples)
    texts = generated_texts(model, completions, Tokenizing(data.processing_class, 32), 4, 3)
    pairs = zip(texts, completions, strict=True)
    expected = [abs(len(text.split()) - len(one.answer.split())) for text, one in pairs]
    score = objective.score(model, data, 12)
    assert score.value == pytest.approx(np.mean(expected))
    np.testing.assert_allclose(score.example_values, expected, atol=1e-9)


def test_an_instance_of_a_class_of_ones_own(model, data):
    class Contains(ExactMatch):
        def _compute(self, predictions, references):
            return {"contains": sum(r in p for p, r in zip(predictions, references, strict=True)) / len(predictions)}

    objective = make_objective(Contains(keep_in_memory=True), max_new_tokens=2)
    texts = generated_texts(model, read_completions(data.examples), Tokenizing(data.processing_class, 32), 4, 2)
    expected = np.mean([row["completion"].strip() in text for row, text in zip(data.examples, texts, strict=True)])
    assert objective.score(model, data, 12).value == pytest.approx(expected)


def test_a_metric_that_keeps_files_goes_to_other_processes(model, data, tmp_path):
    objective = make_objective(ExactMatch(cache_dir=str(tmp_path)), max_new_tokens=2)
    objective.check(data.examples)  # it has locked its files by now
    again = pickle.loads(pickle.dumps(objective))
    assert again.score(model, data, 12) == objective.score(model, data, 12)


def test_what_judging_costs(data):
    tokenizer, rows = data.processing_class, list(data.examples)
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    choices = 2 + 2 + 3  # with their ends
    assert make_objective("accuracy").tokens_per_example(data) == pytest.approx(3 * np.mean(prompts) + choices)
    generated = make_objective("exact_match", max_new_tokens=5)
    assert generated.tokens_per_example(data) == pytest.approx(np.mean(prompts) + 5 * GENERATED_TOKEN)


def test_a_failure_leaves_nothing_behind():
    class Fickle(ExactMatch):
        num_calls = 0

        def _compute(self, predictions, references):
            self.num_calls += 1
            assert len(predictions) == 12
            return {"fickle": 1 / (self.num_calls - 2)}

    objective = MetricObjective(Fickle(keep_in_memory=True))
    rows = questions()
    objective.check(rows)
    with pytest.raises(EvaluationError, match="division by zero"):
        objective.check(rows)
    objective.check(rows)


def test_identity_changes_with_the_script(tmp_path):
    first = make_objective(write_script(tmp_path, "distance", DISTANCE_SCRIPT))
    second = make_objective(write_script(tmp_path, "distance", DISTANCE_SCRIPT.replace("abs(", "1 + abs(")))
    assert first.info == second.info
    assert first.identity != second.identity


def test_the_loss_needs_no_objective():
    assert make_objective("loss") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_metric", ["no_such_metric", "out of reach", "./my_metric.py", "accuracy"]),
        ("./nowhere.py", ["./nowhere.py", "no such script"]),
        (3, ["objective=3"]),
    ],
)
def test_unknown_objectives(name, words):
    with pytest.raises(EvaluationError) as caught:
        make_objective(name)
    assert all(word in str(caught.value) for word in words)


def test_a_broken_script(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be loaded: ZeroDivisionError"):
        make_objective(write_script(tmp_path, "broken", "1 / 0"))


def test_several_figures_need_a_name(data, tmp_path):
    objective = make_objective(write_script(tmp_path, "macro_f1", F1_SCRIPT))
    with pytest.raises(EvaluationError, match=r"\['count', 'f1'\].*macro_f1:f1"):
        objective.check(data.examples)


def test_a_metric_that_fails_does_so_before_a_model_is_there(data, tmp_path):
    objective = make_objective(write_script(tmp_path, "distance", DISTANCE_SCRIPT.replace("/ len", "/ 0 / len")))
    with pytest.raises(
        EvaluationError, match="'distance' fails where predictions equal references: ZeroDivisionError"
    ):
        objective.check(data.examples)


class TestFunctions:
    def test_one_loss_for_each_example(self, model, data):
        def length(model, tokenizer, examples):
            assert not model.training
            return [len(row["prompt"]) for row in examples]

        objective = make_objective(length)
        lengths = [len(row["prompt"]) for row in data.examples][:5]
        assert objective.score(model, data, 5).example_values == tuple(lengths)
        assert (objective.info.name, objective.info.greater_is_better) == ("length", False)
        assert objective.tokens_per_example(data) == 6.0

    @pytest.mark.parametrize("losses", [[1.0], 1.0])
    def test_anything_else_is_refused(self, model, data, losses):
        with pytest.raises(EvaluationError, match="one loss for each"):
            make_objective(lambda model, tokenizer, examples: losses).score(model, data, 5)


def test_compute_arguments_and_direction_can_be_given():
    objective = MetricObjective(ExactMatch(keep_in_memory=True), greater_is_better=False, name="mismatch")
    assert objective.info.name == "mismatch"
    assert objective.info.sign == 1
