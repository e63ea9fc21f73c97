"""Held-out loss of a causal language model, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.calibration_batch import IGNORED_LABEL, to_device


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out sequences, nats per token.

    Attributes:
        mean: over all predicted tokens.
        sequence_losses: mean over the tokens of each sequence, in order.
        num_tokens: predicted tokens of each sequence.
    """

    mean: float
    sequence_losses: tuple[float, ...]
    num_tokens: tuple[int, ...] = ()

    @property
    def weighted_losses(self) -> tuple[float, ...]:
        """One value for each sequence; their mean is ``mean``, their spread tells its standard error.

        The mean is a ratio of sums, ``sum(losses) / sum(tokens)``; these are its linearization (Cochran, Sampling
        Techniques, 1977, section 2.11): ``mean + tokens_i / mean(tokens) * (loss_i - mean)``.
        """
        average = sum(self.num_tokens) / len(self.num_tokens)
        pairs = zip(self.sequence_losses, self.num_tokens, strict=True)
        return tuple(self.mean + count / average * (loss - self.mean) for loss, count in pairs)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> HeldOutLoss:
    """Score batches in evaluation mode; the model's mode is restored.

    Args:
        model: causal language model; gets every entry of a batch but the labels.
        batches: ``input_ids`` and ``labels`` ``[batch, seq]`` (-100 is not predicted), optional ``attention_mask``.

    Raises:
        CalibrationError: no token is predicted.
    """
    sums, counts = summed_losses(model, batches)
    if not any(counts):
        raise CalibrationError("The held-out data holds no token to predict; give non-empty texts with labels.")
    sequence_losses = tuple(total / max(count, 1) for total, count in zip(sums, counts, strict=True))
    return HeldOutLoss(sum(sums) / sum(counts), sequence_losses, tuple(counts))


@torch.no_grad()
def summed_losses(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[list[float], list[int]]:
    """Summed losses and numbers of predicted tokens of each sequence; see :func:`held_out_loss`."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: list[float] = []
    counts: list[int] = []
    try:
        for batch in batches:
            inputs = to_device(batch, device)
            labels = inputs.pop("labels")
            losses, predicted = _token_losses(model(**inputs).logits, labels)
            sums += losses.sum(1).tolist()
            counts += predicted.sum(1).tolist()
    finally:
        model.train(was_training)
    return sums, counts


def predicts_something(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has a label to predict; the first token of a sequence is not."""
    return bool((batch["labels"][:, 1:] != IGNORED_LABEL).any())


def _token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the predicted tokens (0 elsewhere) and which were predicted, each ``[batch, seq - 1]``."""
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view(targets.shape), targets != IGNORED_LABEL
