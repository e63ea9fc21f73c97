"""An objective in a module that other processes can import."""

from __future__ import annotations


def mean_logits(model, tokenizer, examples) -> list[float]:
    """Of each prompt: says nothing, but follows every weight."""
    ids = [tokenizer(row["prompt"], return_tensors="pt")["input_ids"] for row in examples]
    return [float(model(input_ids=one).logits.mean()) for one in ids]
