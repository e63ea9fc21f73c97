"""What a model answers, against one example at a time without padding; and tokens, against SFTTrainer's."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from peft_autoqra.errors import EvaluationError
from peft_autoqra.evaluation.answers import generated_texts, likeliest_choices
from peft_autoqra.evaluation.completions import MAX_CHOICES, Tokenizing, read_completions, with_choices
from peft_autoqra.evaluation.sft import SFTData
from tests.evaluation.tiny_questions import questions
from tests.tiny_data import word_tokenizer
from tests.tiny_evaluator import tiny_args

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}{{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


def chat_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def as_messages(dataset):
    def convert(row):
        said = [("user", row["prompt"]), ("assistant", row["completion"].strip())]
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    return dataset.map(convert, remove_columns=dataset.column_names)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=1)


@torch.no_grad()
def log_likelihood(model, prompt, answer):
    log_probabilities = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(log_probabilities[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def test_likeliest_choices(model):
    tokenizer = word_tokenizer()
    completions = with_choices(read_completions(questions()))
    assert completions[0].choices == (" w40", " w7", " w7 w8")
    expected = []
    for one in completions:
        prompt = tokenizer(one.prompt)["input_ids"]
        answers = [[*tokenizer(choice)["input_ids"], tokenizer.eos_token_id] for choice in one.choices]
        scores = [log_likelihood(model, prompt, answer) for answer in answers]
        expected.append(scores.index(max(scores)))
    found = likeliest_choices(model, completions, Tokenizing(tokenizer), batch_size=5)
    assert found == expected
    assert len(set(found)) > 1


def test_generated_texts(model):
    tokenizer, num_new = word_tokenizer(), 4
    completions = read_completions(questions())
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    model.train()
    found = generated_texts(model, completions, Tokenizing(tokenizer), batch_size=5, max_new_tokens=num_new)
    assert model.training
    model.eval()
    for one, text in zip(completions, found, strict=True):
        ids = tokenizer(one.prompt)["input_ids"]
        for _ in range(num_new):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] in (2, tokenizer.eos_token_id):  # the model's own, and the tokenizer's
                break
        new = ids[len(tokenizer(one.prompt)["input_ids"]) :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("is_chat", [False, True])
def test_tokens_are_those_that_are_trained_on(model, tmp_path, is_chat):
    tokenizer = chat_tokenizer() if is_chat else word_tokenizer()
    given = as_messages(questions()) if is_chat else questions()
    data = SFTData(model, tiny_args(tmp_path, max_length=64), given, given, tokenizer)
    for row, one in zip(data.held_out, read_completions(given), strict=True):
        prompt, answer = Tokenizing(tokenizer).pair(one, one.answer)
        assert [*prompt, *answer] == row["input_ids"]
        if not is_chat:
            assert [label for label in row["labels"] if label != -100] == answer
        assert Tokenizing(tokenizer).prompt(one) == prompt


def test_long_prompts_lose_their_beginning():
    tokenizer = word_tokenizer()
    (one,) = read_completions(Dataset.from_list([{"prompt": "w1 w2 w3 w4 w5", "completion": " w6 w7"}]))
    assert Tokenizing(tokenizer, 5).pair(one, one.answer) == ([4, 5], [6, 7, tokenizer.eos_token_id])
    assert Tokenizing(tokenizer, 5).prompt(one, room=3) == [4, 5]
    assert Tokenizing(tokenizer, 2).prompt(one, room=3) == [5]


class TestReading:
    def test_conversations_of_other_forms(self):
        rows = [{"conversations": [{"from": "user", "value": "w1"}, {"from": "assistant", "value": "w2"}]}]
        (one,) = read_completions(Dataset.from_list(rows))
        assert one.answer == "w2"
        assert one.prompt == ({"role": "user", "content": "w1"},)

    def test_own_choices(self):
        rows = [{"prompt": "w1", "completion": "b", "choices": ["a", "b"]}]
        (one,) = with_choices(read_completions(Dataset.from_list(rows)))
        assert one.label == 1

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ([{"text": "w1 w2"}], ["no completion", "'text'", "`prompt` and `completion`"]),
            ([{"prompt": "w1", "completion": ""}], ["no completion"]),
            ([{"messages": [{"role": "user", "content": "w1"}]}], ["no completion", "assistant"]),
            ([{"prompt": "w1", "completion": "c", "choices": ["a", "b"]}], ["'c'", "not among"]),
        ],
    )
    def test_what_has_no_completion_is_refused(self, rows, words):
        with pytest.raises(EvaluationError) as caught:
            read_completions(Dataset.from_list(rows))
        assert all(word in str(caught.value) for word in words)

    @pytest.mark.parametrize("num", [1, MAX_CHOICES + 1])
    def test_too_few_and_too_many_choices_are_refused(self, num):
        rows = [{"prompt": "w1", "completion": f"w{i}"} for i in range(num)]
        with pytest.raises(EvaluationError, match=f"{num} different completions.*`choices`"):
            with_choices(read_completions(Dataset.from_list(rows)))
