"""Examples as prompt and completion: what is asked of a model, and what it should answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from peft_autoqra.errors import EvaluationError

Text = str | tuple[Mapping[str, Any], ...]
MAX_CHOICES = 64  # each of them is scored for every example


@dataclass(frozen=True)
class Completion:
    """One example.

    Attributes:
        prompt: text, or messages.
        answer: what should follow, as text.
        choices: answers to choose from, ``answer`` among them; empty where there are none.
    """

    prompt: Text
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> int:
        """Position of the answer among the choices."""
        return self.choices.index(self.answer)


def read_completions(examples: Dataset) -> list[Completion]:
    """Prompts and answers of ``prompt`` and ``completion`` columns, or of messages whose last one is the assistant's.

    Args:
        examples: in a format that SFTTrainer takes; texts to be continued, ``choices``, may be given beside them.

    Raises:
        EvaluationError: an example has no completion, or one that is not among its choices.
    """
    return [_read(dict(row), number) for number, row in enumerate(examples)]


def with_choices(completions: list[Completion]) -> list[Completion]:
    """Examples that each have choices: their own, or all answers that occur.

    Raises:
        EvaluationError: there are too many different answers, or only one.
    """
    if all(completion.choices for completion in completions):
        return completions
    choices = tuple(sorted({completion.answer for completion in completions}))
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise EvaluationError(
            f"The data has {len(choices)} different completions, and labels are chosen among 2 to {MAX_CHOICES}. Give "
            "a column `choices` (a list of texts, the completion among them), or a metric that takes texts, such as "
            "exact_match."
        )
    return [replace(completion, choices=choices) for completion in completions]


@dataclass(frozen=True)
class Tokenizing:
    """Turns examples into tokens, as SFTTrainer does.

    Attributes:
        tokenizer: with a chat template, where prompts are messages.
        max_length: tokens of a sequence at most; what is too long loses the beginning of its prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None

    def prompt(self, completion: Completion, room: int = 0) -> list[int]:
        """Tokens to be continued, with room for so many more within ``max_length``."""
        return self._cut(self._ids(completion.prompt), room)

    def pair(self, completion: Completion, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and those of an answer with the end that a trained model gives it."""
        prompt = self._ids(completion.prompt)
        whole = self._ids(completion.prompt, answer)
        start = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
        start = min(start, len(whole) - 1)  # an answer has a token, whatever the template makes of it
        return self._cut(whole[:start], len(whole) - start), whole[start:]

    def _cut(self, prompt: list[int], room: int) -> list[int]:
        return prompt if self.max_length is None else prompt[-max(self.max_length - room, 1) :]

    def _ids(self, prompt: Text, answer: str | None = None) -> list[int]:
        """Of the prompt, and of an answer to it where there is one."""
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            end = tokenizer.eos_token or ""
            text = prompt if answer is None else prompt + answer.removesuffix(end or "\0") + end
            return list(tokenizer(text)["input_ids"])
        messages = [dict(message) for message in prompt]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=answer is None, tokenize=True, return_dict=True
        )
        return list(rendered["input_ids"])


def _read(row: dict[str, Any], number: int) -> Completion:
    row = maybe_convert_to_chatml(row)
    prompt, answer = row.get("prompt"), row.get("completion")
    if answer is None and row.get("messages"):
        *before, last = row["messages"]
        prompt, answer = (before, [last]) if last["role"] == "assistant" else (None, None)
    if not prompt or not answer:
        raise EvaluationError(
            f"Example {number} of the held-out data has no completion (columns: {sorted(row)}). A metric needs "
            "columns `prompt` and `completion`, or `messages` of which the last is the assistant's; the held-out loss "
            "takes any text."
        )
    text = answer if isinstance(answer, str) else "".join(str(message.get("content") or "") for message in answer)
    choices = tuple(map(str, row.get("choices") or ()))
    if choices and text not in choices:
        raise EvaluationError(f"The completion {text!r} of example {number} is not among its choices {choices}.")
    return Completion(prompt if isinstance(prompt, str) else tuple(_messages(prompt)), text, choices)


def _messages(prompt: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without the empty fields that Arrow adds where other messages have them."""
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
