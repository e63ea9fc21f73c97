"""A calibration batch, and the gradients that calibration starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class CalibrationBatch:
    """One batch on the device that the model reads it on.

    Attributes:
        inputs: of the model, without labels.
        mask: positions that count, ``[batch, seq]``, bool.
        predicts: positions whose next token is predicted, ``[batch, seq - 1]``, bool.
    """

    inputs: dict[str, Any]
    mask: Tensor
    predicts: Tensor

    @classmethod
    def prepare(cls, batch: Mapping[str, Any], device: torch.device) -> CalibrationBatch:
        """Of a batch as a data collator makes it."""
        inputs = to_device(batch, device)
        labels = inputs.pop("labels", inputs["input_ids"])
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        # A prediction counts when both its position and its target are real tokens (left padding has neither).
        return cls(inputs, mask, (labels[:, 1:] != IGNORED_LABEL) & mask[:, 1:] & mask[:, :-1])

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.mask.device

    @property
    def num_predictions(self) -> int:
        """Predicted tokens."""
        return int(self.predicts.sum())

    def back_propagate(self, logits: Tensor, generator: torch.Generator) -> None:
        """Make gradients of the summed losses of tokens drawn from the predictions.

        Args:
            logits: ``[batch, seq, vocab]``, with a graph.
            generator: on the batch's device.
        """
        predictions = logits[:, :-1][self.predicts.to(logits.device)].float()  # [num_predictions, vocab]
        probabilities = predictions.detach().softmax(-1).to(generator.device)
        sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
        functional.cross_entropy(predictions, sampled.to(predictions.device), reduction="sum").backward()


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; a padding-free one holds integers too, which stay as they are."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
