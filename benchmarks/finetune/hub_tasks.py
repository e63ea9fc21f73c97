"""Data sets of the hub as prompt and completion, for models that are large enough for them.

GSM8K (openai/gsm8k, MIT): grade school problems with worked solutions. MetaMathQA (meta-math/MetaMathQA, MIT): 395,000
problems and solutions rewritten from the training parts of GSM8K and MATH; judged, as PEFT's comparison of methods
does, on the test part of GSM8K. Alpaca (yahma/alpaca-cleaned, CC BY 4.0): 51,760 instructions with answers.

Solutions end in "The answer is: 72", which is MetaMathQA's form, so that one metric reads both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from datasets import Dataset, DatasetDict, load_dataset

Row = dict[str, str]
SHUFFLE_SEED = 0
MAX_PROMPT_CHARACTERS = 1200
"""So that answers begin within 768 tokens; all of GSM8K's prompts are shorter."""
CALCULATOR_NOTE = re.compile(r"<<[^>]*>>")  # "48/2 = <<48/2=24>>24"


def gsm8k() -> DatasetDict:
    """A twentieth of the training part is dev; test is the whole official one."""
    hub = load_dataset("openai/gsm8k", "main")
    return gsm8k_splits(hub["train"], hub["test"])


def metamath() -> DatasetDict:
    """Dev holds a fiftieth of the original problems, with all that was rewritten from them; test is GSM8K's."""
    train = load_dataset("meta-math/MetaMathQA", split="train")
    return metamath_splits(train, load_dataset("openai/gsm8k", "main", split="test"))


def alpaca() -> DatasetDict:
    """A fiftieth is dev, a twenty-fifth test."""
    return alpaca_splits(load_dataset("yahma/alpaca-cleaned", split="train"))


def gsm8k_splits(train: Dataset, test: Dataset) -> DatasetDict:
    """From the hub's columns ``question`` and ``answer``."""

    def is_dev(row: Row) -> bool:
        return _percentile(row["question"]) < 5

    return DatasetDict(
        train=_formatted(train.filter(lambda row: not is_dev(row)), gsm8k_row),
        dev=_formatted(train.filter(is_dev), gsm8k_row),
        test=_formatted(test, gsm8k_row),
    )


def metamath_splits(train: Dataset, test: Dataset) -> DatasetDict:
    """From MetaMathQA's columns ``query``, ``response`` and ``original_question``, and GSM8K's test part."""

    def is_dev(row: Row) -> bool:
        return _percentile(row["original_question"]) < 2

    return DatasetDict(
        train=_formatted(train.filter(lambda row: not is_dev(row)), metamath_row),
        dev=_formatted(train.filter(is_dev), metamath_row),
        test=_formatted(test, gsm8k_row),
    )


def alpaca_splits(rows: Dataset) -> DatasetDict:
    """From Alpaca's columns ``instruction``, ``input`` and ``output``; what is asked twice stays in one split."""
    data = _formatted(rows, alpaca_row)
    return DatasetDict(
        train=data.filter(lambda row: _percentile(row["prompt"]) >= 6),
        dev=data.filter(lambda row: _percentile(row["prompt"]) < 2),
        test=data.filter(lambda row: 2 <= _percentile(row["prompt"]) < 6),
    )


def gsm8k_row(row: Row) -> Row:
    """The solution in words, without the notes for a calculator, and its number after "####"."""
    solution, number = row["answer"].split("####")
    words = CALCULATOR_NOTE.sub("", solution).strip()
    return {"prompt": _problem(row["question"]), "completion": f" {words}\nThe answer is: {number.strip()}"}


def metamath_row(row: Row) -> Row:
    """The response as it is."""
    return {"prompt": _problem(row["query"]), "completion": f" {row['response'].strip()}"}


def alpaca_row(row: Row) -> Row:
    """Alpaca's own template, which has two forms."""
    instruction, context = row["instruction"].strip(), row["input"].strip()
    if context:
        kind = "that describes a task, paired with an input that provides further context"
        asked = f"### Instruction:\n{instruction}\n\n### Input:\n{context}"
    else:
        kind = "that describes a task"
        asked = f"### Instruction:\n{instruction}"
    prompt = (
        f"Below is an instruction {kind}. Write a response that appropriately completes the request."
        f"\n\n{asked}\n\n### Response:\n"
    )
    return {"prompt": prompt, "completion": row["output"].strip()}


def _problem(question: str) -> str:
    return f"Question: {question.strip()} Think step by step.\nAnswer:"


def _formatted(rows: Dataset, form: Callable[[Row], Row]) -> Dataset:
    """Rows of two texts in random order, without those that have no completion or too long a prompt."""

    def is_usable(row: Row) -> bool:
        return bool(row["completion"].strip()) and len(row["prompt"]) <= MAX_PROMPT_CHARACTERS

    return rows.map(form, remove_columns=rows.column_names).filter(is_usable).shuffle(seed=SHUFFLE_SEED)


def _percentile(text: str) -> int:
    """0 to 99, the same for a text on every machine, whatever its case."""
    return int(hashlib.sha256(text.strip().casefold().encode()).hexdigest(), 16) % 100
