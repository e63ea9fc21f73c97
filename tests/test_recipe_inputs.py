"""Which file or part of one is held out."""

from __future__ import annotations

import pytest

from peft_autoqra.recipe import DataArguments, RecipeError
from peft_autoqra.recipe_inputs import load_datasets, load_eval_dataset
from tests.conftest import TinyLlamaFactory
from tests.tiny_folder import make_tiny_folder


def test_a_file_for_judging_takes_the_place_of_what_a_recipe_splits_off(tiny_llama: TinyLlamaFactory, tmp_path):
    data = make_tiny_folder(tmp_path, tiny_llama()).data
    train, test = str(data / "train.jsonl"), str(data / "test.jsonl")
    split = DataArguments(train_file=train, test_split_size=0.25)
    both = DataArguments(train_file=train, test_split_size=0.25, eval_file=test)
    assert [len(part) for part in load_datasets(split, seed=0)] == [9, 3]
    assert load_eval_dataset(split, seed=0)[:] == load_datasets(split, seed=0)[1][:]
    assert len(load_eval_dataset(both, seed=0)) == 6
    with pytest.raises(RecipeError, match="eval_file or test_split_size"):
        load_datasets(both, seed=0)
