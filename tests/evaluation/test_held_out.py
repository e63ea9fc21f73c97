"""The held-out loss against transformers' own, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from peft_autoqra.errors import CalibrationError
from peft_autoqra.evaluation.held_out import held_out_loss


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(0))


def padded_batch() -> dict[str, torch.Tensor]:
    """Three texts of 9, 6 and 4 tokens; the prompts of the first two are not predicted."""
    batch = {"input_ids": tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    for row, length in enumerate((9, 6, 4)):
        batch["input_ids"][row, length:] = 2
        batch["attention_mask"][row, length:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][0, :4] = -100
    batch["labels"][1, :2] = -100
    return batch


def test_is_the_model_s_own_loss_of_every_sequence_without_padding(tiny_llama):
    model, batch = tiny_llama(initializer_range=0.3), padded_batch()
    result = held_out_loss(model, [batch])
    expected, counts = [], []
    for row, length in enumerate((9, 6, 4)):
        labels = batch["labels"][row : row + 1, :length]
        with torch.no_grad():
            expected.append(float(model(input_ids=batch["input_ids"][row : row + 1, :length], labels=labels).loss))
        counts.append(int((labels[:, 1:] != -100).sum()))
    assert counts == [5, 4, 3]
    assert result.sequence_losses == pytest.approx(expected, rel=1e-5)
    mean = sum(loss * count for loss, count in zip(expected, counts, strict=True)) / sum(counts)
    assert result.mean == pytest.approx(mean, rel=1e-5)


def test_does_not_depend_on_the_batches(tiny_llama):
    model, batch = tiny_llama(), padded_batch()
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    together, apart = held_out_loss(model, [batch]), held_out_loss(model, rows)
    assert together.sequence_losses == pytest.approx(apart.sequence_losses, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_comes_back(tiny_llama, training):
    model = tiny_llama().train(training)
    held_out_loss(model, [padded_batch()])
    assert model.training is training


def test_entries_that_are_no_tensors_go_to_the_model(tiny_llama):
    model, batch = tiny_llama(), padded_batch()
    assert held_out_loss(model, [batch | {"max_length_q": 9}]) == held_out_loss(model, [batch])


def test_refuses_data_without_predictions(tiny_llama):
    nothing = padded_batch()
    nothing["labels"][:, 1:] = -100
    for batches in ([], [nothing]):
        with pytest.raises(CalibrationError, match="no token to predict"):
            held_out_loss(tiny_llama(), batches)
