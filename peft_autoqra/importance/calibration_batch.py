"""A calibration batch, and the gradients that calibration starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_autoqra.errors import CalibrationError

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
        """Of a batch as a data collator makes it.

        Raises:
            CalibrationError: no ``input_ids`` of two dimensions, or labels or a mask of another shape.
        """
        _check(batch)
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

        Raises:
            CalibrationError: logits that are not finite.
        """
        predictions = logits[:, :-1][self.predicts.to(logits.device)].float()  # [num_predictions, vocab]
        if not torch.isfinite(predictions.sum()):
            raise CalibrationError(
                "The model's predictions hold NaN or infinity during calibration, and no targeted module does; check "
                "its last norm and its head, or load the model in bfloat16 or float32."
            )
        probabilities = predictions.detach().softmax(-1)
        sampled = sample_tokens(probabilities, generator)
        # The gradient of the cross entropy, whose own passes over all logits would give the same.
        predictions.backward(probabilities.scatter_add_(-1, sampled, -torch.ones_like(sampled, dtype=torch.float32)))


def sample_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, by the inverse of its cumulative distribution; ``[rows, 1]``, int64.

    One random number a row: ``torch.multinomial`` draws one for every token of the vocabulary, on one CPU core.

    Args:
        probabilities: ``[rows, vocab]``, float32.
        generator: on any device.
    """
    cumulative = probabilities.cumsum(-1)
    # in (0, 1], so that a token without probability is never the first to reach it
    level = 1 - torch.rand(len(probabilities), 1, generator=generator, device=generator.device)
    return torch.searchsorted(cumulative, level.to(cumulative.device) * cumulative[:, -1:])


def _check(batch: Mapping[str, Any]) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise CalibrationError(
            "A calibration batch must be a mapping with `input_ids`, a tensor [batch, seq]; this one is "
            + (
                f"{ {key: getattr(value, 'shape', value) for key, value in batch.items()} }."
                if isinstance(batch, Mapping)
                else f"a {type(batch).__name__}."
            )
        )
    for key in ("labels", "attention_mask"):
        if key in batch and batch[key].shape != ids.shape:
            raise CalibrationError(
                f"{key} has shape {tuple(batch[key].shape)}, input_ids {tuple(ids.shape)}; they must be equal. "
                "Calibration is for causal language models, whose labels are the tokens."
            )


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; a padding-free one holds integers too, which stay as they are."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
