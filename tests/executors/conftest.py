"""A search of nine trials on a tiny model, and what it gives in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import PreTrainedModel
from trl import SFTConfig

from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher
from peft_autoqra.trial import Trial
from tests.tiny_data import token_dataset, word_tokenizer

MakeSearcher = Callable[..., AutoQRASearcher]


@pytest.fixture(scope="session")
def make_searcher(tiny_llama, tmp_path_factory) -> MakeSearcher:
    cache_dir = tmp_path_factory.mktemp("cache")

    def make(
        output_dir, model: PreTrainedModel | None = None, callbacks=(), *, data=None, judge=None, **changes
    ) -> AutoQRASearcher:
        train, held_out = data or (token_dataset(seed=0), token_dataset(seed=1))
        settings = {
            "memory_budget": "qlora-4bit-r16",
            "rank_choices": [0, 2, 4],
            "bit_choices": [2, 4, 8],
            "granularity": "block",
            "num_calibration_sequences": 4,
            "num_eval_sequences": 4,
            "max_cost": 1000.0,
            "max_trials": 9,
            "num_seeds": 2,
        }
        args = SFTConfig(
            output_dir=str(output_dir / "sft"),
            per_device_train_batch_size=2,
            max_length=16,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-3,
            max_steps=2,
        )
        return AutoQRASearcher(
            tiny_llama() if model is None else model,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=word_tokenizer(),
            args=args,
            search_config=AutoQRASearchConfig(
                output_dir=str(output_dir), cache_dir=str(cache_dir), **settings | changes
            ),
            show_progress=False,
            callbacks=callbacks,
            objective=judge,
        )

    return make


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """As workers have: sums that are split among threads are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole(make_searcher, tmp_path_factory) -> list[tuple]:
    """The deterministic search, in this process."""
    with one_thread():
        return outcomes(make_searcher(tmp_path_factory.mktemp("whole")).run(deterministic=True).trials)


def outcomes(trials: tuple[Trial, ...] | list[Trial]) -> list[tuple]:
    """All but times, to the last bit."""
    return [(t.number, t.origin, t.plan, t.fidelity, t.cost, t.loss, t.result.sequence_losses) for t in trials]


def check_counted_once(result) -> None:
    assert sorted(trial.number for trial in result.trials) == list(range(len(result.trials)))
    calibration = result.spending["calibration_cost"]
    assert result.cost == pytest.approx(calibration + sum(trial.cost for trial in result.trials))
