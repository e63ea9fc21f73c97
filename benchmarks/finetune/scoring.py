"""Figures of a model on prepared examples, from one forward pass over each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.finetune.records import Split
from benchmarks.finetune.setting import Setting
from benchmarks.finetune.tasks import Task
from peft_autoqra.evaluation.answers import generated_texts
from peft_autoqra.evaluation.completions import Tokenizing, read_completions
from peft_autoqra.evaluation.held_out import HeldOutLoss
from peft_autoqra.evaluation.metric_objective import MetricObjective
from peft_autoqra.evaluation.named_objective import make_objective


@dataclass(frozen=True)
class _Example:
    """Outcome of one example: summed losses of all predicted tokens and of the completion's, and their counts."""

    loss: float
    tokens: int
    answer_loss: float
    answer_tokens: int
    is_right: bool | None


def score(model: nn.Module, setting: Setting, rows: Dataset, examples: Dataset) -> Split:
    """Loss over prompt and completion, loss of the completion, and the task's metric.

    Where the task's answers begin with different tokens, the metric "accuracy" is taken from the same forward pass:
    the likeliest of these tokens is the answer.

    Args:
        model: causal language model.
        setting: task, tokenizer and batch size.
        rows: ``input_ids`` and ``completion_mask`` of each example.
        examples: the same examples as they were given.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    choices = answer_tokens(setting) if setting.task.metric == "accuracy" else None
    outcomes = _outcomes(model, rows, setting.recipe.batch_size, choices)
    counts = tuple(outcome.tokens for outcome in outcomes)
    sums = [outcome.loss for outcome in outcomes]
    held_out = HeldOutLoss(sum(sums) / sum(counts), tuple(s / c for s, c in zip(sums, counts, strict=True)), counts)
    if not torch.isfinite(torch.tensor(held_out.mean)):
        raise ArithmeticError(f"the held-out loss is {held_out.mean}")
    right = _right_answers(model, setting, examples, outcomes)
    answer_loss = sum(outcome.answer_loss for outcome in outcomes)
    return Split(
        loss=held_out.mean,
        answer_loss=answer_loss / sum(outcome.answer_tokens for outcome in outcomes),
        metric=right.count("1") / len(right) if right else None,
        losses=tuple(round(value, 5) for value in held_out.weighted_losses),
        right=right,
    )


def answer_tokens(setting: Setting) -> tuple[int, ...]:
    """First tokens of the completions that the training split knows.

    Raises:
        ValueError: two completions begin with the same token.
    """
    answers = sorted(set(setting.task.train["completion"]))
    first = tuple(setting.tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in answers)
    if len(set(first)) != len(answers):
        raise ValueError(f"The completions {answers} of {setting.task.name} begin with the same tokens.")
    return first


@torch.no_grad()
def _outcomes(model: nn.Module, rows: Dataset, batch_size: int, choices: Sequence[int] | None) -> list[_Example]:
    """In the order of the rows; batches are of similar length."""
    model.eval()
    ids = list(rows["input_ids"])
    masks = [mask[: len(row)] for row, mask in zip(ids, rows["completion_mask"], strict=True)]  # TRL cuts ids alone
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    outcomes: dict[int, _Example] = {}
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        scored = _batch([ids[i] for i in picked], [masks[i] for i in picked], model, choices)
        outcomes |= zip(picked, scored, strict=True)
    return [outcomes[index] for index in range(len(ids))]


def _batch(
    ids: list[list[int]], masks: list[list[int]], model: nn.Module, choices: Sequence[int] | None
) -> list[_Example]:
    device = next(model.parameters()).device
    length = max(map(len, ids))
    inputs = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=device)
    present = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=device)
    logits: Tensor = model(input_ids=inputs, attention_mask=present).logits
    targets = inputs[:, 1:].masked_fill(present[:, 1:] == 0, -100)
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    examples = []
    for row, mask in enumerate(masks):
        begin, end = mask.index(1), len(mask)
        is_right = None
        if choices is not None:
            likeliest = logits[row, begin - 1, list(choices)].float().argmax()
            is_right = choices[int(likeliest)] == ids[row][begin]
        answer = losses[row, begin - 1 : end - 1]
        examples.append(
            _Example(float(losses[row].sum()), end - 1, float(answer.sum()), len(answer), is_right),
        )
    return examples


def _right_answers(model: nn.Module, setting: Setting, examples: Dataset, outcomes: list[_Example]) -> str:
    task: Task = setting.task
    if task.metric == "loss":
        return ""
    if task.metric == "accuracy":
        return "".join("1" if outcome.is_right else "0" for outcome in outcomes)
    return "".join("1" if is_right else "0" for is_right in _right_texts(model, setting, examples))


def _right_texts(model: nn.Module, setting: Setting, examples: Dataset) -> list[bool]:
    """Whether what the model writes is right, one example at a time: an objective's own values are of groups."""
    task, recipe = setting.task, setting.recipe
    objective = make_objective(task.metric, max_new_tokens=task.max_new_tokens)
    assert isinstance(objective, MetricObjective)  # as all that Task.metric names
    completions = read_completions(examples)
    tokenizing = Tokenizing(setting.tokenizer, recipe.max_length)
    texts = generated_texts(model, completions, tokenizing, recipe.batch_size, task.max_new_tokens)
    pairs = zip(texts, (completion.answer.strip() for completion in completions), strict=True)
    figures = [objective.metric.compute(predictions=[text], references=[answer]) for text, answer in pairs]
    return [next(iter(figure.values())) == 1 for figure in figures]
