"""``autoqra evaluate`` on model folders and JSONL files, against one sequence at a time."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from scipy.stats import t as student_t
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM

from peft_autoqra import AutoQRAQuantConfig, cli, uniform_plan
from peft_autoqra.commands import evaluate as command
from peft_autoqra.commands import searcher_recipe
from peft_autoqra.evaluation.answers import likeliest_choices
from peft_autoqra.evaluation.completions import Completion, Tokenizing, with_choices
from peft_autoqra.evaluation.objective import Score
from peft_autoqra.model_evaluation import Judged, result_of
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from tests.evaluation.harness_task import write_task
from tests.evaluation.tiny_questions import DISTANCE_SCRIPT, questions, write_script
from tests.test_cli import fails_with_one_line, json_of
from tests.tiny_data import word_tokenizer
from tests.tiny_folder import RECIPE_FLAGS, TinyFolder, make_tiny_folder

pytestmark = pytest.mark.usefixtures("metric_modules")


@dataclass(frozen=True)
class Places:
    """Where the model, its adapter and the questions lie."""

    tiny: TinyFolder
    adapter: str
    questions: str

    @property
    def model(self) -> str:
        return str(self.tiny.model)


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_llama) -> Places:
    directory = tmp_path_factory.mktemp("evaluate")
    tiny = make_tiny_folder(directory, tiny_llama())
    for name, seed in (("questions", 0), ("train", 1)):
        questions(num=10, seed=seed).to_json(tiny.data / f"{name}.jsonl")
    flags = ["--model_name_or_path", str(tiny.model), "--eval_file", str(tiny.data / "questions.jsonl")]
    flags += ["--train_file", str(tiny.data / "train.jsonl"), *RECIPE_FLAGS, "--bits", "4", "--r", "4"]
    assert cli.main(["train", *flags, "--learning_rate", "0.05", "--output_dir", str(directory / "adapter")]) == 0
    return Places(tiny, str(directory / "adapter"), str(tiny.data / "questions.jsonl"))


def evaluated(tmp_path, *argv: str) -> dict:
    path = tmp_path / "out" / "evaluation.json"
    assert cli.main(["evaluate", *argv, "--use_cpu", "--output_file", str(path)]) == 0
    return json.loads(path.read_text())


@torch.no_grad()
def answer_losses(model, rows) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses of the completions, which alone are predicted, and their numbers of tokens."""
    tokenizer = word_tokenizer()
    sums, counts = [], []
    for row in rows:
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        answer = [*answer, tokenizer.eos_token_id]
        log_probabilities = model(torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
        sums.append(-sum(log_probabilities[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer)))
        counts.append(len(answer))
    return np.array(sums), np.array(counts)


def test_adapter_beside_its_base(places, tmp_path, capsys):
    figures = ["--eval_file", places.questions, "--metric", "accuracy", "--per_device_eval_batch_size", "4"]
    result = evaluated(tmp_path, places.adapter, *figures, "--baseline", places.model)
    models = (
        AutoPeftModelForCausalLM.from_pretrained(places.adapter),
        AutoModelForCausalLM.from_pretrained(places.model),
    )
    rows = questions(num=10)
    (sums, counts), (base_sums, _) = (answer_losses(model.eval(), rows) for model in models)
    total = counts.sum()
    assert result["figures"][0]["name"] == "held-out loss"
    assert result["figures"][0]["value"] == pytest.approx(sums.sum() / total, rel=1e-4)
    assert result["baseline_figures"][0]["value"] == pytest.approx(base_sums.sum() / total, rel=1e-4)
    # the ratio estimator's standard error (Cochran 1977, Eq. 2.46), and Student's t
    error = np.sqrt(((sums - sums.sum() / total * counts) ** 2).sum() / (10 * 9)) / counts.mean()
    assert result["figures"][0]["standard_error"] == pytest.approx(error, rel=1e-3)
    half = student_t.ppf(0.975, 9) * error
    assert np.subtract(*result["figures"][0]["interval"]) == pytest.approx(-2 * half, rel=1e-3)
    gaps = sums - base_sums
    paired = np.sqrt(((gaps - gaps.sum() / total * counts) ** 2).sum() / (10 * 9)) / counts.mean()
    loss = result["differences"][0]
    assert loss["value"] == pytest.approx(gaps.sum() / total, rel=1e-3)
    assert loss["standard_error"] == pytest.approx(paired, rel=1e-3)
    assert loss["verdict"] == ("better" if loss["interval"][1] < 0 else "not different beyond the interval")
    assert result["differences"][1]["name"] == "accuracy"
    perplexity = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity"))
    assert perplexity.split()[1:] == [f"{np.exp(summed.sum() / total):.2f}" for summed in (sums, base_sums)]


def test_a_quantized_base_and_a_plan_are_what_they_are_without_training(places, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(places.model, quantization_config=AutoQRAQuantConfig(bits=3))
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    uniform_plan(AutoModelForCausalLM.from_pretrained(places.model), 3, 4).save_pretrained(tmp_path / "plan")
    data = ["--eval_file", places.questions, "--max_length", "64"]
    sums, counts = answer_losses(base.eval(), questions(num=10))
    quantized = evaluated(tmp_path, str(tmp_path / "base"), *data)
    plan = evaluated(tmp_path, str(tmp_path), "--model_name_or_path", places.model, *data)  # as of a search
    assert plan["model"] == str(tmp_path / "plan")
    assert quantized["figures"][0]["value"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-4)
    assert plan["figures"][0]["value"] == pytest.approx(quantized["figures"][0]["value"], rel=1e-4)


def test_a_model_and_itself_are_the_same(places, tmp_path, capsys):
    flags = ["--eval_file", places.questions, "--metric", "accuracy", "--baseline", places.model]
    result = evaluated(tmp_path, places.model, *flags)
    assert [figure["verdict"] for figure in result["differences"]] == ["the same", "the same"]
    assert all(figure["interval"] is None for figure in result["differences"])
    assert "the same" in capsys.readouterr().out


def test_losses_per_token_of_other_tokens_are_not_compared():
    loss = Judged(HELD_OUT_LOSS, Score(2.0, (1.0, 3.0)), (4, 4))
    other = Judged(HELD_OUT_LOSS, Score(2.0, (1.0, 3.0)), (5, 5))
    right = [Judged(ObjectiveInfo("accuracy"), Score(value, (value, 0.0))) for value in (1.0, 0.0)]
    result = result_of(["a", "b"], [[loss, right[0]], [other, right[1]]], num_examples=2, start=0.0)
    assert [figure.name for figure in result.differences] == ["accuracy"]
    assert "unknown" in command.result_text(result)


def test_the_metric_of_the_guide(places, tmp_path):
    guide = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    (script,) = re.findall(r"```python\n(# macro_f1\.py.*?)```", guide, re.DOTALL)
    flags = ["--eval_file", places.questions, "--metric", write_script(tmp_path, "macro_f1", script)]
    result = evaluated(tmp_path, places.model, *flags)
    rows = [Completion(row["prompt"], row["completion"]) for row in questions(num=10)]
    model = AutoModelForCausalLM.from_pretrained(places.model).eval()
    examples = with_choices(rows)
    predicted = likeliest_choices(model, examples, Tokenizing(word_tokenizer()), 4)
    expected = f1_score([one.label for one in examples], predicted, average="macro")
    assert result["figures"][1]["value"] == pytest.approx(expected)


def test_texts_and_a_limit(places, tmp_path):
    script = write_script(tmp_path, "distance", DISTANCE_SCRIPT)
    flags = ["--eval_file", places.questions, "--metric", script, "exact_match", "--limit", "4"]
    result = evaluated(tmp_path, "--model_name_or_path", places.model, *flags, "--max_new_tokens", "2")
    assert [figure["name"] for figure in result["figures"]] == ["held-out loss", "distance", "exact_match"]
    assert [figure["num_values"] for figure in result["figures"]] == [4, 4, 4]
    assert result["num_examples"] == 4


def test_any_text_and_a_recipe(places, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    train = places.tiny.data / "train.jsonl"
    lines = [f"model_name_or_path: {places.model}", f"train_file: {train}", "test_split_size: 0.5", "packing: true"]
    recipe.write_text("\n".join([*lines, "bits: 3"]))
    assert evaluated(tmp_path, "--config", str(recipe))["num_examples"] == 5
    texts = evaluated(tmp_path, places.model, "--eval_file", str(places.tiny.data / "test.jsonl"))
    assert texts["num_examples"] == 6


def test_a_dry_run_loads_no_model(places, capsys, monkeypatch):
    monkeypatch.setattr(command, "judge", lambda *_: pytest.fail("judged"))
    argv = ["evaluate", places.adapter, "--baseline", places.model, "--eval_file", places.questions]
    assert cli.main([*argv, "--metric", "accuracy", "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert f"adapter  {places.adapter} on {places.model}" in text
    assert "figures  held-out loss, accuracy" in text
    assert "10 held-out examples" in text
    forecast = json_of(capsys, [*argv, "--dry_run"], "evaluate --dry_run")
    assert [model["kind"] for model in forecast["models"]] == ["adapter", "model"]
    assert forecast["num_examples"] == 10


def test_a_document_for_programs(places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = json_of(capsys, ["evaluate", places.model, "--eval_file", places.questions, "--use_cpu"], "evaluate")
    assert document["figures"][0]["name"] == "held-out loss"
    assert not list(tmp_path.iterdir())  # it writes nothing that it was not told to


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_tasks_need_no_other_data(places, tmp_path):
    flags = ["--tasks", write_task(tmp_path), "--limit", "6", "--num_fewshot", "1"]
    result = evaluated(tmp_path, places.adapter, *flags, "--baseline", places.model)
    assert [figure["name"] for figure in result["figures"]] == ["pick acc", "pick acc_norm"]
    assert [figure["num_values"] for figure in result["differences"]] == [6, 6]
    assert result["num_examples"] == 0


class TestMistakes:
    """All before a model is loaded."""

    @pytest.fixture(autouse=True)
    def _nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(command, "_judge", lambda *_: pytest.fail("loaded"))

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--metric", "no_such_metric"], ["no_such_metric", "./my_metric.py"]),
            (["--limit", "1"], ["limit=1", "at least 2"]),
            (["--metrics", "accuracy"], ["--metrics", "--metric"]),
            (["--tasks", "nowhere.yaml"], []),
            (["--output_file", "."], ["output_file='.'", "cannot be written"]),
        ],
    )
    def test_flags(self, capsys, places, flags, words):
        fails_with_one_line(capsys, ["evaluate", places.model, "--eval_file", places.questions, *flags], *words)

    def test_no_model(self, capsys, places):
        fails_with_one_line(capsys, ["evaluate", "--eval_file", places.questions], "--model_name_or_path")

    def test_the_model_comes_first(self, capsys, places):
        argv = ["evaluate", "--eval_file", places.questions, places.model]
        fails_with_one_line(capsys, argv, repr(places.model), "MODEL comes right after `autoqra evaluate`")

    def test_no_data(self, capsys, places):
        fails_with_one_line(capsys, ["evaluate", places.model], "--eval_file")

    def test_data_without_completions(self, capsys, places):
        argv = ["evaluate", places.model, "--eval_file", str(places.tiny.data / "test.jsonl"), "--metric", "accuracy"]
        fails_with_one_line(capsys, argv, "no completion", "`prompt` and `completion`")


def test_a_search_for_a_metric_that_is_not_there(capsys, places, monkeypatch):
    monkeypatch.setattr(searcher_recipe, "load_base_model", lambda *_: pytest.fail("loaded"))
    argv = ["search", *places.tiny.flags, "--objective"]
    fails_with_one_line(capsys, [*argv, "no_such_metric"], "no_such_metric", "./my_metric.py")
    fails_with_one_line(capsys, [*argv, "accuracy"], "no completion")


def test_a_model_that_is_not_there(capsys, places):
    fails_with_one_line(capsys, ["evaluate", "no/model", "--eval_file", places.questions, "--use_cpu"], "no/model")


def test_a_damaged_adapter_is_one_line(capsys, places, tmp_path):
    adapter = Path(shutil.copytree(places.adapter, tmp_path / "adapter"))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fails_with_one_line(capsys, ["evaluate", str(adapter), "--eval_file", places.questions], str(adapter))
