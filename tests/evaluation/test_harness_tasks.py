"""Tasks of lm-evaluation-harness on local files, against one question at a time."""

from __future__ import annotations

import pickle
import sys
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
import torch

from peft_autoqra.errors import EvaluationError, MissingDependencyError
from peft_autoqra.evaluation.harness_tasks import HarnessTasks, TaskObjective
from peft_autoqra.evaluation.named_objective import make_objective
from peft_autoqra.evaluation.objective import HeldOutExamples
from tests.evaluation.harness_task import task_rows, write_task
from tests.evaluation.tiny_questions import questions
from tests.tiny_data import word_tokenizer

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture
def data():
    return HeldOutExamples(questions(), word_tokenizer(), batch_size=4, max_length=32, mean_tokens=6.0)


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(MissingDependencyError, match=r"pip install 'peft-autoqra\[lm-eval\]'"):
        make_objective("lm_eval:arc_easy")


@needs_harness
class TestTasks:
    @torch.no_grad()
    def test_accuracy(self, model, data, tmp_path):
        objective = make_objective(f"lm_eval:{write_task(tmp_path)}")
        assert (objective.info.name, objective.info.greater_is_better) == ("pick acc", True)
        score = objective.score(model, data, 8)
        right = []
        for row in task_rows()[:8]:
            likelihoods = []
            for choice in row["choices"]:
                prompt, answer = (data.processing_class(text)["input_ids"] for text in (row["question"], choice))
                log_probabilities = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
                likelihoods.append(sum(log_probabilities[len(prompt) - 1 + i, t] for i, t in enumerate(answer)))
            right.append(float(np.argmax(likelihoods) == row["right"]))
        assert score.value == np.mean(right)
        np.testing.assert_allclose(score.example_values, right, atol=1e-9)

    def test_tokens_are_counted(self, data, tmp_path):
        tokens = make_objective(f"lm_eval:{write_task(tmp_path)}:acc_norm").tokens_per_example(data)
        assert tokens == (5 + 2) + (5 + 1)

    def test_the_same_examples_before_each_question_every_time(self, model, tmp_path):
        tasks = HarnessTasks([write_task(tmp_path)], num_fewshot=2)
        scores = [tasks.score(model, word_tokenizer(), batch_size=4, limit=8) for _ in range(3)]
        assert scores[0] == scores[1] == scores[2]
        assert [score.info.name for score in scores[0]] == ["pick acc", "pick acc_norm"]
        assert all("w" in request.args[0] and "\n" in request.args[0] for request in tasks.tasks["pick"].instances)

    def test_another_process_loads_it_again(self, model, data, tmp_path):
        objective = TaskObjective(write_task(tmp_path), "acc_norm")
        again = pickle.loads(pickle.dumps(objective))
        assert again.identity == objective.identity
        assert again.score(model, data, 8) == objective.score(model, data, 8)

    @pytest.mark.parametrize(("metric", "words"), [("f1", ["no metric 'f1'", "acc, acc_norm"])])
    def test_unknown_metric(self, tmp_path, metric, words):
        with pytest.raises(EvaluationError) as caught:
            TaskObjective(write_task(tmp_path), metric)
        assert all(word in str(caught.value) for word in words)

    def test_data_that_is_not_there(self, tmp_path):
        path = write_task(tmp_path)
        (tmp_path / "pick.jsonl").unlink()
        with pytest.raises(EvaluationError, match=r"cannot be loaded .*local files"):
            TaskObjective(path)

    def test_a_file_that_is_no_task(self, tmp_path):
        with pytest.raises(EvaluationError, match=r"There is no file .*none\.yaml"):
            HarnessTasks([str(tmp_path / "none.yaml")])
