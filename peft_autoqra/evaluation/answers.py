"""What a model answers: the likeliest of some choices, or text of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from peft_autoqra.evaluation.completions import Completion, Tokenizing
from peft_autoqra.evaluation.held_out import summed_losses
from peft_autoqra.importance.calibration_batch import IGNORED_LABEL

T = TypeVar("T")


def likeliest_choices(
    model: nn.Module, completions: Sequence[Completion], tokenizing: Tokenizing, batch_size: int
) -> list[int]:
    """Position of the choice that a model finds likeliest, for each example.

    Compared are the summed log-likelihoods of the choices' tokens, with the end of the answer that training adds, so
    that a choice which is the beginning of another one has no advantage.

    Args:
        model: causal language model.
        completions: with choices.
        tokenizing: of the model.
        batch_size: sequences at a time.
    """
    pairs = [tokenizing.pair(example, choice) for example in completions for choice in example.choices]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))  # little padding
    batches = (_labelled([pairs[i] for i in batch]) for batch in _batches(order, batch_size))
    found = dict(zip(order, summed_losses(model, batches)[0], strict=True))
    losses = iter([found[i] for i in range(len(pairs))])
    by_example = [[next(losses) for _ in example.choices] for example in completions]
    return [own.index(min(own)) for own in by_example]


@torch.no_grad()
def generated_texts(
    model: Any,
    completions: Sequence[Completion],
    tokenizing: Tokenizing,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """What a model continues each prompt with, greedily, without special tokens and surrounding white space.

    Args:
        model: with ``generate``.
        completions: their answers are not looked at.
        tokenizing: of the model.
        batch_size: prompts at a time.
        max_new_tokens: generated tokens at most.
    """
    tokenizer = tokenizing.tokenizer
    config = _greedy(model, tokenizer, max_new_tokens)
    device = next(model.parameters()).device
    prompts = [tokenizing.prompt(completion, max_new_tokens) for completion in completions]
    texts: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), batch_size):
            ids, mask = _left_padded([prompts[i] for i in batch], config.pad_token_id)
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            decoded = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            texts.update(zip(batch, map(str.strip, decoded), strict=True))
    finally:
        model.train(was_training)
    return [texts[i] for i in range(len(prompts))]


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Of the model's own settings only which tokens end a text."""
    own = getattr(model, "generation_config", None)
    ends = own.eos_token_id if own is not None else None
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    ends += [] if tokenizer.eos_token_id is None or tokenizer.eos_token_id in ends else [tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, ``[batch, seq]``, so that all prompts end where generation begins."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _labelled(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
    """Ids, mask and labels, ``[batch, seq]``, padded on the right; answers alone are predicted."""
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

    return {
        "input_ids": padded([[*prompt, *answer] for prompt, answer in pairs], 0),
        "attention_mask": padded([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0),
        "labels": padded([[*[IGNORED_LABEL] * len(prompt), *answer] for prompt, answer in pairs], IGNORED_LABEL),
    }


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
