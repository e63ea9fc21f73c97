"""A search of nine trials on a tiny model, and what it gives in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from peft_autoqra import AutoQRASearcher
from peft_autoqra.trial import Trial
from tests.tiny_searcher import tiny_searcher

MakeSearcher = Callable[..., AutoQRASearcher]


@pytest.fixture(scope="session")
def make_searcher(tiny_llama, tmp_path_factory) -> MakeSearcher:
    cache_dir = tmp_path_factory.mktemp("cache")

    def make(output_dir, model=None, callbacks=(), *, data=None, judge=None, **changes) -> AutoQRASearcher:
        return tiny_searcher(
            tiny_llama() if model is None else model,
            output_dir,
            data=data,
            callbacks=callbacks,
            judge=judge,
            cache_dir=str(cache_dir),
            **changes,
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
