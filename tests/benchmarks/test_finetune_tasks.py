"""Tasks of the fine-tuning benchmark, from rows as their sources have them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks.finetune.hub_tasks import alpaca_splits, gsm8k_splits, metamath_splits
from benchmarks.finetune.tasks import FINAL_ANSWER, TASKS, SplitSizes, load_task
from peft_autoqra.errors import EvaluationError
from peft_autoqra.evaluation.named_objective import make_objective

SPLITS = ("train", "dev", "test")
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "prepare_demo_assets.py"))


def twins(number: int) -> list[tuple[str, str]]:
    """A question and the same one the other way round, as QuaRTz has them; others share less than half the words."""
    thing = " ".join(f"{part}{number}" for part in ("can", "of", "red", "paint"))
    question = "If {} gets {} then it is\n\n A: larger\n B: smaller"
    return [(question.format(thing, way), key) for way, key in (("hot", "A"), ("cold", "B"))]


HEADLINES = [(f"headline  number {i}, of the day", str(i % 2)) for i in range(200)]
HEADLINES += [("Headline number 7 of the day!", "1")]
QUARTZ = [question for number in range(60) for question in twins(number)]
QUARTZ += [("Which is it?\n\n A: this\n B: that", "A"), ("Which is it?\n\n A: this\n B: that", "B")]


def write_samples(path: Path, samples: list[tuple[str, str]]) -> Path:
    """Rows as the wheel has them."""
    rows = [
        {"input": [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}], "ideal": answer}
        for text, answer in samples
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What the script makes of a wheel."""
    directory = tmp_path_factory.mktemp("cache")
    members = [
        write_samples(directory / "sarcasm.jsonl", HEADLINES),
        write_samples(directory / "quartz.jsonl", QUARTZ),
    ]
    SCRIPT["build_evals"](members, directory / "evals-registry")
    return directory


@pytest.fixture
def prepared(cache, monkeypatch):
    """The same, found by whoever looks for it."""
    monkeypatch.setenv("AUTOQRA_CACHE", str(cache))


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    texts = {split: (folder / f"{split}.jsonl").read_text() for split in SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


def test_headlines_are_questions_and_appear_once(cache):
    splits = read(cache / "evals-registry" / "headlines")
    rows = [row for split in SPLITS for row in splits[split]]
    assert len(rows) == 200
    assert {"prompt": "Headline: headline number 7, of the day\nSarcastic:", "completion": " yes"} in rows
    assert {"prompt": "Headline: headline number 8, of the day\nSarcastic:", "completion": " no"} in rows
    assert 170 <= len(splits["train"]) <= 190


def test_a_prefix_of_a_split_is_a_fair_sample(cache):
    train = read(cache / "evals-registry" / "headlines")["train"]
    numbers = [int(row["prompt"].split("number ")[1].split(",")[0]) for row in train]
    assert numbers != sorted(numbers)
    assert 60 < sum(numbers[:40]) / 40 < 140


def test_questions_keep_their_choices_and_contradictions_are_left_out(cache):
    rows = [row for rows in read(cache / "evals-registry" / "quartz").values() for row in rows]
    prompt = "Question: If can0 of0 red0 paint0 gets hot then it is\n A: larger\n B: smaller\nAnswer:"
    assert {"prompt": prompt, "completion": " A"} in rows
    assert len(rows) == 120
    assert not any("Which is it" in row["prompt"] for row in rows)


def test_twins_are_in_one_split(cache):
    splits = read(cache / "evals-registry" / "quartz")
    things = {split: [row["prompt"].split(" gets")[0] for row in rows] for split, rows in splits.items()}
    assert all(things.values())
    for split in SPLITS:
        assert all(things[split].count(thing) == 2 for thing in things[split])


def test_families_join_what_shares_half_of_the_words_directly_or_not():
    texts = ["a b c d", "a b c e", "a b f e", "x y", "x z"]
    assert SCRIPT["families"](texts) == {text: text if text[0] == "x" else "a b c d" for text in texts}


def test_reviews_keep_the_splits_that_results_are_recorded_on(tmp_path):
    train = "gee , a second assassin shot kennedy ? moot point ."
    test = "by the end , i was looking for something hard with which to bludgeon myself unconscious ."
    source = tmp_path / "reviews.csv"
    source.write_text(f'text,label,source\n"{train}",0,rotten_tomatoes\n"{test}",1,rotten_tomatoes\n')
    SCRIPT["build_reviews"]([source], tmp_path / "built")
    assert read(tmp_path / "built" / "rotten_tomatoes") == {
        "train": [{"prompt": f"Review: {train}\nSentiment:", "completion": " negative"}],
        "dev": [],
        "test": [{"prompt": f"Review: {test}\nSentiment:", "completion": " positive"}],
    }


@pytest.mark.usefixtures("prepared")
def test_task_takes_the_front_of_each_split(cache):
    task = load_task("quartz", SplitSizes(train=20, dev=2, test=4))
    splits = read(cache / "evals-registry" / "quartz")
    assert task.metric == "accuracy"
    for split, rows in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        assert rows.to_list() == splits[split][: len(rows)]
    assert (len(task.train), len(task.dev), len(task.test)) == (20, 2, 4)
    make_objective(task.metric).check(task.test)


@pytest.mark.usefixtures("prepared")
def test_too_large_sizes_are_refused_by_number(cache):
    size = len(read(cache / "evals-registry" / "quartz")["dev"])
    with pytest.raises(EvaluationError, match=rf"^dev=500 examples of 'quartz' are wanted, and it has {size};"):
        load_task("quartz", SplitSizes(train=20, dev=500, test=4))


def test_unknown_names_and_empty_splits_are_refused():
    sizes = SplitSizes(train=1, dev=1, test=1)
    with pytest.raises(EvaluationError, match=r"no task 'headline'\. Did you mean 'headlines'\?.*reviews, headlines"):
        load_task("headline", sizes)
    with pytest.raises(EvaluationError, match="dev=0 examples"):
        SplitSizes(train=1, dev=0, test=1)


def gsm8k(numbers: range) -> Dataset:
    """Rows as the hub has them."""
    answer = "She sold {0}+1 = <<{0}+1={1}>>{1} clips.\nThat is all.\n#### {1:,}"
    rows = [{"question": f"{i} clips and one more?", "answer": answer.format(i, i + 1)} for i in numbers]
    return Dataset.from_list(rows)


def test_gsm8k_ends_in_its_number():
    splits = gsm8k_splits(gsm8k(range(1000, 1200)), gsm8k(range(3)))
    assert sum(len(splits[split]) for split in ("train", "dev")) == 200
    assert 3 <= len(splits["dev"]) <= 20
    assert {
        "prompt": "Question: 2 clips and one more? Think step by step.\nAnswer:",
        "completion": " She sold 2+1 = 3 clips.\nThat is all.\nThe answer is: 3",
    } in splits["test"].to_list()
    assert splits["train"].column_names == ["prompt", "completion"]


def test_metamath_keeps_what_comes_from_one_problem_in_one_split():
    rows = [
        {
            "query": f"How many {form} are {i}?",
            "response": f"{i}.\n#### {i}\nThe answer is: {i}",
            "original_question": f"Problem {i}",
            "type": "GSM_Rephrased",
        }
        for i in range(200)
        for form in ("clips", "pins")
    ]
    splits = metamath_splits(Dataset.from_list(rows), gsm8k(range(3)))
    counts = {split: [row["prompt"].split("are ")[1] for row in splits[split].to_list()] for split in ("train", "dev")}
    assert len(counts["train"]) + len(counts["dev"]) == 400
    assert all(rows and all(rows.count(one) == 2 for one in rows) for rows in counts.values())
    assert len(splits["test"]) == 3
    assert splits["dev"][0]["prompt"].endswith(" Think step by step.\nAnswer:")


def test_alpaca_has_its_template_and_repeated_instructions_share_a_split():
    rows = [
        {"instruction": f"Say {i}.", "input": "in French" * (i % 2), "output": f"Here: {i} {take}"}
        for i in range(500)
        for take in range(2)
    ]
    unusable = [
        {"instruction": "Be still.", "input": "", "output": ""},
        {"instruction": "Shorten.", "input": "a long text " * 100, "output": "Text."},
    ]
    splits = alpaca_splits(Dataset.from_list([*rows, *unusable]))
    prompts = {split: set(splits[split]["prompt"]) for split in SPLITS}
    assert sum(len(splits[split]) for split in SPLITS) == 1000
    assert sum(map(len, prompts.values())) == 500
    assert all(prompts.values())
    prompts = set.union(*prompts.values())
    assert any(prompt.endswith(" the request.\n\n### Instruction:\nSay 8.\n\n### Response:\n") for prompt in prompts)
    assert any("context. Write" in prompt and "\n\n### Input:\nin French\n\n" in prompt for prompt in prompts)


@pytest.mark.usefixtures("metric_modules")
def test_solutions_are_judged_by_what_they_come_to():
    objective = make_objective(FINAL_ANSWER, max_new_tokens=TASKS["gsm8k"].max_new_tokens)
    objective.check(gsm8k_splits(gsm8k(range(1000, 1050)), gsm8k(range(3)))["test"])
    assert objective.writes_text
    assert objective.info.greater_is_better
    right = {
        "So 5.\nThe answer is: 1,234": "The answer is: 1234.0",
        "The answer is: $18.": "The answer is: 18",
        "The answer is: 7 clips\nQuestion: more? The answer is: 8": "The answer is: 7",
        "The answer is: \\frac{1}{2}": "The answer is: \\frac{1}{2}",
    }
    wrong = {
        "18": "The answer is: 18",
        "The answer is: 1/2": "The answer is: 1",
        "The answer is: -3": "The answer is: 3",
        "The answer is: 3x": "The answer is: 3",
    }
    for pairs, share in ((right, 1.0), (wrong, 0.0)):
        for prediction, reference in pairs.items():
            found = objective.metric.compute(predictions=[prediction], references=[reference])
            assert found == {"final_answer": share}, prediction
