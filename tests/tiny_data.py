"""Data and a tokenizer small enough to be made in-process."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 128


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w0`` to ``w125`` and two special tokens."""
    vocab = {f"w{i}": i for i in range(VOCAB_SIZE - 2)} | {"<pad>": VOCAB_SIZE - 2, "<eos>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def token_dataset(seed: int, num_sequences: int = 24, length: int = 12) -> Dataset:
    """Sequences in which each token is mostly the one before plus one: something that can be learned."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(VOCAB_SIZE - 2, size=(num_sequences, 1))
    jumps = rng.integers(5, size=(num_sequences, length)) * (rng.random((num_sequences, length)) < 0.2)
    return Dataset.from_dict({"input_ids": ((starts + np.arange(length) + jumps) % (VOCAB_SIZE - 2)).tolist()})
