"""Whatever goes wrong in a trial is recorded, nothing of it stays, and the next trial is none the worse."""

from __future__ import annotations

import gc
import re
import signal
import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.evaluation.trial_memory import is_out_of_memory
from peft_autoqra.trial import Fidelity, TrialStatus
from tests.tiny_evaluator import model_state, tiny_args, tiny_trials

FIDELITY = Fidelity(num_steps=2, num_eval_sequences=4)
TOO_MANY_BYTES = 2**50


@pytest.fixture(scope="module")
def trials(tiny_llama, tmp_path_factory):
    trials = tiny_trials(tiny_llama(), tiny_args(tmp_path_factory.mktemp("sft")))
    for num_steps in (0, 1):  # what first uses leave behind, such as decoded weights, is there before any test
        trials.evaluator().evaluate(trials.plan, Fidelity(num_steps, 4))
    return trials


@contextmanager
def broken_data(trials, action):
    """Reading a row of the training data calls something; ``datasets`` handles every ``Exception`` of a row."""
    data = trials.data.train
    trials.data.train = data.with_transform(lambda _: action())
    try:
        yield
    finally:
        trials.data.train = data


@contextmanager
def broken_layer(trials, action):
    """The last layer's forward pass calls something, with the graph of all other layers in memory."""
    hook = trials.resident.model.model.layers[-1].register_forward_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        hook.remove()


def sleep():
    time.sleep(60)


def allocate_tensor():
    torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)


def allocate_bytes():
    bytearray(2**62)


def interrupt():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    signal.raise_signal(signal.SIGINT)


def num_alive():
    """Trainers, optimizers, adapters, and tensors; collects nothing."""
    kinds = (Trainer, torch.optim.Optimizer, BaseTunerLayer, torch.Tensor)
    num_of_type = Counter(map(type, gc.get_objects()))
    return [sum(num for type_, num in num_of_type.items() if kind in type_.__mro__) for kind in kinds]


@contextmanager
def nothing_left(trials):
    """The model is as before, and nothing more is in memory, without help of the automatic collection."""
    trials.resident.restore()
    before = model_state(trials.resident.model)
    gc.disable()
    try:
        alive = num_alive()
        yield
        assert num_alive() == alive
    finally:
        gc.enable()
    trials.resident.restore()
    assert model_state(trials.resident.model) == before


def test_successes_leave_nothing_behind(trials):
    evaluator = trials.evaluator(max_trial_seconds=600)
    evaluator.evaluate(trials.plan, FIDELITY)
    with nothing_left(trials):
        results = [evaluator.evaluate(trials.plan, FIDELITY) for _ in range(5)]
    assert {result.status for result in results} == {TrialStatus.COMPLETED}
    assert len({result.loss for result in results}) == 1


@pytest.mark.parametrize(
    ("break_it", "action", "error"),
    [
        (broken_data, sleep, r"^TimeLimitExceeded: it took longer than 1 seconds \(max_trial_seconds\); raise that"),
        (broken_layer, sleep, "^TimeLimitExceeded: it took longer than 1 seconds"),
        (
            broken_layer,
            allocate_tensor,
            r"^Out of memory \(RuntimeError: .*can't allocate.*\); lower per_",
        ),
        (broken_layer, allocate_bytes, r"^Out of memory \(MemoryError: \); lower per_device_train_batch_size"),
        (broken_data, allocate_tensor, "^Out of memory"),
        (broken_data, lambda: 1 / 0, "^ZeroDivisionError: division by zero$"),
    ],
)
def test_failures_leave_nothing_behind(trials, break_it, action, error):
    expected = trials.evaluator().evaluate(trials.plan, FIDELITY)
    evaluator = trials.evaluator(max_trial_seconds=1 if action is sleep else None)
    with nothing_left(trials), break_it(trials, action):
        failed = evaluator.evaluate(trials.plan, FIDELITY)
    assert failed.status is TrialStatus.FAILED
    assert re.search(error, failed.error)
    assert failed.seconds < 30
    assert trials.evaluator().evaluate(trials.plan, FIDELITY).loss == expected.loss


def test_slow_trainings_are_stopped(trials):
    with nothing_left(trials):
        result = trials.evaluator(max_trial_seconds=1).evaluate(trials.plan, Fidelity(10**6, 4))
    assert result.error.startswith("TimeLimitExceeded: it took longer than 1 seconds")


@pytest.mark.parametrize("num_steps", [0, 2])
def test_interruptions_by_the_user_end_the_search(trials, num_steps):
    with nothing_left(trials), broken_layer(trials, interrupt), pytest.raises(KeyboardInterrupt):
        trials.evaluator(max_trial_seconds=600).evaluate(trials.plan, Fidelity(num_steps, 4))


def test_a_training_that_diverges_is_stopped_at_that_step(trials):
    with nothing_left(trials):
        result = trials.evaluator().evaluate(trials.plan, Fidelity(10**6, 4, learning_rate_factor=1e30))
    assert result.status is TrialStatus.FAILED
    assert result.error.startswith(
        "ArithmeticError: the training loss is nan at step 2 of 1000000; lower learning_rate"
    )


def test_learning_rate_factor_multiplies_that_of_the_recipe(trials, tiny_llama, tmp_path):
    args = tiny_args(tmp_path, learning_rate=2 * trials.args.learning_rate)
    twice = tiny_trials(tiny_llama(), args).evaluator().evaluate(trials.plan, FIDELITY)

    def loss(factor):
        fidelity = Fidelity(2, 4, learning_rate_factor=factor)
        return trials.evaluator().evaluate(trials.plan, fidelity).loss

    assert loss(2.0) == twice.loss
    assert loss(1.0) == trials.evaluator().evaluate(trials.plan, FIDELITY).loss != twice.loss
    assert trials.args.learning_rate == args.learning_rate / 2


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_limit_is_above_zero(trials, seconds):
    with pytest.raises(InvalidPlanError, match=f"max_trial_seconds={seconds} must be above 0"):
        trials.evaluator(max_trial_seconds=seconds)


def test_lack_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
