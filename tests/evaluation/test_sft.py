"""What data is taken, and that a trial leaves the model as it was."""

from __future__ import annotations

from functools import partial

import pytest
from datasets import Dataset, DatasetDict

from peft_autoqra.errors import CalibrationError
from peft_autoqra.evaluation.sft import SFTData
from peft_autoqra.trial import Fidelity, TrialStatus
from tests.tiny_data import token_dataset, word_tokenizer
from tests.tiny_evaluator import model_state, tiny_args, tiny_trials


@pytest.fixture
def make_args(tmp_path):
    return partial(tiny_args, tmp_path)


@pytest.fixture
def prepare(tiny_llama, make_args):
    def prepare(train=None, held_out=None, **changes) -> SFTData:
        train, held_out = (token_dataset(seed=0) if d is None else d for d in (train, held_out))
        return SFTData(tiny_llama(), make_args(**changes), train, held_out, word_tokenizer())

    return prepare


class TestData:
    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (token_dataset(seed=0).to_iterable_dataset(), "IterableDataset"),
            (DatasetDict(test=token_dataset(seed=0)), "DatasetDict"),
            ({"test": token_dataset(seed=0)}, "dict"),
        ],
    )
    def test_other_kinds_are_refused(self, prepare, data, kind):
        with pytest.raises(CalibrationError, match=f"eval_dataset is a {kind}"):
            prepare(held_out=data)
        with pytest.raises(CalibrationError, match=f"train_dataset is a {kind}"):
            prepare(train=data)

    def test_held_out_data_is_needed(self, tiny_llama, make_args):
        with pytest.raises(CalibrationError, match="eval_dataset is a NoneType"):
            SFTData(tiny_llama(), make_args(), token_dataset(seed=0), None, word_tokenizer())

    def test_columns_that_the_trainer_does_not_take_are_named(self, prepare):
        with pytest.raises(CalibrationError, match=r"Columns: .*'review'.*'text' \(dataset_text_field\)") as caught:
            prepare(train=Dataset.from_dict({"review": ["w1 w2"]}))
        assert isinstance(caught.value.__cause__, KeyError | ValueError)

    @pytest.mark.parametrize("setting", ["packing", "padding_free"])
    def test_packing_is_refused_unless_allowed(self, prepare, setting):
        with pytest.raises(CalibrationError, match="set packing: false"):
            prepare(**{setting: True})

    def test_held_out_data_without_predictions_is_refused(self, prepare):
        ids = [[1, 2, 3]] * 6
        rows = Dataset.from_dict({"input_ids": ids, "labels": [[1, -100, -100]] * 6})
        with pytest.raises(CalibrationError, match="no token to predict"):
            prepare(held_out=rows)
        late = Dataset.from_dict({"input_ids": ids, "labels": [[1, -100, -100]] * 5 + [[1, 2, 3]]})
        assert len(prepare(held_out=late).held_out) == 6


class TestModelIsLeftAsItWas:
    @pytest.fixture
    def evaluate(self, tiny_llama, make_args):
        def evaluate(*, checkpointing: bool):
            model, args = tiny_llama(), make_args(gradient_checkpointing=checkpointing)
            model.model.norm.weight.requires_grad_(False)
            model.get_input_embeddings().register_forward_hook(lambda *_: None)
            trials = tiny_trials(model, args)
            before = model_state(model)
            evaluator = trials.evaluator()
            results = [evaluator.evaluate(trials.plan, Fidelity(num_steps=1, num_eval_sequences=4)) for _ in range(2)]
            trials.resident.restore()
            return results, before, model_state(model)

        return evaluate

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_after_trials(self, evaluate, checkpointing):
        results, before, after = evaluate(checkpointing=checkpointing)
        assert [result.status for result in results] == [TrialStatus.COMPLETED] * 2
        assert results[0].loss == results[1].loss
        assert after == before

    @pytest.mark.parametrize("breaks", ["start_adapter", "train"])
    def test_after_errors(self, evaluate, monkeypatch, breaks):
        def fail(*_args, **_kwargs):
            raise RuntimeError("out of luck")

        target = "tuner.dense_adapter.start_adapter" if breaks != "train" else "evaluation.sft.SFTTrainer.train"
        monkeypatch.setattr(f"peft_autoqra.{target}", fail)
        results, before, after = evaluate(checkpointing=True)
        assert [result.error for result in results] == ["RuntimeError: out of luck"] * 2
        assert after == before
