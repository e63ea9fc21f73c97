"""A search in trackers: what arrives in real TensorBoard files and in trackio's real database."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackio import sqlite_storage, utils
from transformers import TrainerCallback
from trl import SFTConfig

from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher
from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.objective_info import HELD_OUT_LOSS, ObjectiveInfo
from peft_autoqra.paired import paired_difference
from peft_autoqra.recipe import RecipeError
from peft_autoqra.reporting_integrations import ReportingIntegration, make_integrations
from peft_autoqra.search_callback import SearchCallback
from peft_autoqra.search_metrics import summary_metrics, trial_metrics
from peft_autoqra.search_tracker import TRACKING_FILE, SearchTracker
from tests.tiny_data import token_dataset, word_tokenizer
from tests.tiny_progress import make_progress, make_trial

TRIALS = [
    make_trial(0, 4.0, origin="baseline"),
    make_trial(1, 5.0, steps=1),
    make_trial(2, None),
    make_trial(3, 3.5, seconds=12.0),
]
RESULT = SimpleNamespace(
    winner=SimpleNamespace(first=TRIALS[3], loss=3.5),
    margin=None,
    seconds=72.0,
    cost=0.5,
    objective=HELD_OUT_LOSS,
    verdict="There was no searched plan to compare with.",
)


@pytest.fixture(autouse=True)
def _no_tracker_in_the_environment(monkeypatch):
    for name in ("TENSORBOARD_LOGGING_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_tracker(tmp_path, tiny_llama) -> Callable[..., SearchTracker]:
    def make(*integrations: ReportingIntegration, **recipe) -> SearchTracker:
        args = SFTConfig(output_dir=str(tmp_path / "sft"), report_to=[], use_cpu=True, bf16=False, **recipe)
        config = AutoQRASearchConfig(output_dir=str(tmp_path / "out"), max_cost=2.0)
        (tmp_path / "out").mkdir(exist_ok=True)
        return SearchTracker(integrations, args, config, tiny_llama())

    return make


class Recorder(TrainerCallback):
    """Keeps what it is told; fails when it is told of a step that it does not like."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.heard: list[tuple] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.heard.append(("begin", args.run_name))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == self.fails_at:
            raise ConnectionError("unreachable")
        self.heard.append((state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append(("end",))


def _watch(tracker: SearchTracker, *, begin: int = 0, end: int = len(TRIALS), result=RESULT) -> None:
    tracker.on_search_begin(make_progress(*TRIALS[:begin]))
    for number in range(begin, end):
        tracker.on_trial_end(TRIALS[number], make_progress(*TRIALS[: number + 1], num_running=1))
    tracker.on_search_end(result, make_progress(*TRIALS[:end]))


def _refuse(*_: object) -> None:
    raise AssertionError("a connection was opened")


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_one_run_with_trials_as_steps(make_tracker, tmp_path):
    _watch(make_tracker(*make_integrations(["tensorboard"])))
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert run.name.startswith("out-")
    scalars = _scalars(run)
    assert scalars["eval/loss"] == [(1, 4.0), (2, 5.0), (4, 3.5)]
    assert scalars["eval/loss_after_8_steps"] == [(1, 4.0), (4, 3.5)]
    assert scalars["eval/best_loss"] == [(1, 4.0), (2, 4.0), (3, 4.0), (4, 3.5)]
    assert scalars["eval/best_baseline_loss"] == [(step, 4.0) for step in (1, 2, 3, 4)]
    assert scalars["train/seconds"] == [(1, 10.0), (2, 10.0), (3, 10.0), (4, 12.0)]
    assert scalars["train/num_failed"][-2:] == [(3, 1.0), (4, 1.0)]
    assert scalars["train/average_bits"][0] == (1, 3.0)
    assert [value for _, value in scalars["train/cost"]] == pytest.approx([0.3, 0.3125, 0.4125, 0.5125])
    assert scalars["eval/winner_loss"] == [(4, 3.5)]
    events = EventAccumulator(str(run)).Reload()
    (verdict,) = events.Tensors("train/verdict/text_summary")
    assert verdict.tensor_proto.string_val[0].decode() == RESULT.verdict
    (config,) = events.Tensors("model_config/text_summary")
    assert json.loads(config.tensor_proto.string_val[0])["autoqra_search"]["max_cost"] == 2.0


def test_an_interrupted_search_goes_on_in_the_same_run(make_tracker, tmp_path):
    _watch(make_tracker(*make_integrations(["tensorboard"])), end=2, result=None)
    # a trial was told, but not reported, before the process died
    _watch(make_tracker(*make_integrations(["tensorboard"])), begin=3)
    _watch(make_tracker(*make_integrations(["tensorboard"])), begin=4)  # nothing is left; nothing is reported twice
    (run,) = (tmp_path / "out" / "runs").iterdir()
    scalars = _scalars(run)
    assert scalars["train/seconds"] == [(1, 10.0), (2, 10.0), (3, 10.0), (4, 12.0)]
    assert scalars["eval/winner_loss"] == [(4, 3.5)]


def test_trackio_keeps_a_run_on_disk_and_needs_no_network(make_tracker, tmp_path, monkeypatch, capfd):
    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    recipe = {"project": "films", "run_name": "reviews"}
    _watch(make_tracker(*make_integrations(["trackio"]), **recipe), end=2, result=None)
    _watch(make_tracker(*make_integrations(["trackio"]), **recipe), begin=2)
    storage = sqlite_storage.SQLiteStorage
    assert storage.get_runs("films") == ["reviews-search"]
    logs = [entry for entry in storage.get_logs("films", "reviews-search") if "train/cost" in entry]
    assert [entry["train/global_step"] for entry in logs] == [1, 2, 3, 4]
    assert [entry.get("eval/loss") for entry in logs] == [4.0, 5.0, None, 3.5]
    assert capfd.readouterr().out == ""  # trackio prints, and standard output is for results


def test_recipe_names_the_run_but_does_not_share_it_with_its_fine_tune(make_tracker):
    named, unnamed = Recorder(), Recorder()
    _watch(make_tracker(ReportingIntegration("named", named), run_name="reviews"))
    _watch(make_tracker(ReportingIntegration("unnamed", unnamed)))
    assert named.heard[0] == ("begin", "reviews-search")
    assert unnamed.heard[0][1].startswith("out-")


def test_a_tracker_that_fails_is_left_out_and_catches_up_later(make_tracker):
    good, bad = Recorder(), Recorder(fails_at=2)
    with pytest.warns(
        UserWarning, match=r"goes on without bad, which failed \(ConnectionError: unreachable\)"
    ) as record:
        _watch(make_tracker(ReportingIntegration("bad", bad), ReportingIntegration("good", good)))
    assert sum("goes on without" in str(warning.message) for warning in record) == 1
    assert [entry[0] for entry in good.heard] == ["begin", 1, 2, 3, 4, 4, "end"]
    assert [entry[0] for entry in bad.heard] == ["begin", 1]
    mended = Recorder()
    _watch(make_tracker(ReportingIntegration("bad", mended)), begin=4)
    assert [entry[0] for entry in mended.heard] == ["begin", 2, 3, 4, 4, "end"]


def test_state_of_trackers_that_are_left_out_is_kept(make_tracker, tmp_path):
    _watch(make_tracker(ReportingIntegration("one", Recorder())), end=2, result=None)
    _watch(make_tracker(ReportingIntegration("other", Recorder())), begin=2)
    told = json.loads((tmp_path / "out" / TRACKING_FILE).read_text())["told"]
    assert {name: state["num_trials"] for name, state in told.items()} == {"one": 2, "other": 4}


def test_best_loss_is_of_the_first_seed_at_the_recipes_learning_rate():
    other_seed = copy.deepcopy(TRIALS[3])
    object.__setattr__(other_seed.fidelity, "seed", 1)
    metrics = trial_metrics([TRIALS[0], other_seed], calibration_cost=0.0, seed=0)
    assert (metrics["eval_loss"], metrics["eval_best_loss"]) == (3.5, 4.0)


def test_figures_of_another_objective_have_its_name_and_its_direction():
    accuracy = ObjectiveInfo("my task acc,none", greater_is_better=True)
    told = [make_trial(0, -0.5, origin="baseline"), make_trial(1, -0.25)]
    metrics = trial_metrics(told, calibration_cost=0.0, seed=0, objective=accuracy)
    figures = {name: value for name, value in metrics.items() if name.startswith("eval_")}
    assert figures == {
        "eval_my_task_acc_none": 0.25,
        "eval_my_task_acc_none_after_8_steps": 0.25,
        "eval_best_my_task_acc_none": 0.5,
        "eval_best_baseline_my_task_acc_none": 0.5,
    }
    winner = SimpleNamespace(first=told[0], loss=-0.5)
    margin = paired_difference([[-1.0, -1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, -1.0]])  # a quarter more are right
    result = SimpleNamespace(**vars(RESULT) | {"winner": winner, "margin": margin, "objective": accuracy})
    result.num_searched = 1
    summary = summary_metrics(result)
    assert summary["eval_winner_my_task_acc_none"] == 0.5
    assert summary["eval_margin_low"] < summary["eval_margin"] == 0.25 < summary["eval_margin_high"]


def test_a_search_that_ends_before_its_trackers_are_opened_leaves_them_alone(make_tracker):
    recorder = Recorder()
    make_tracker(ReportingIntegration("one", recorder)).on_search_end(None, make_progress())
    assert not recorder.heard


def test_trackers_that_are_missing_or_unknown_are_refused_at_once():
    with pytest.raises(RecipeError, match="'tensorbord': tensorbord is not supported, only"):
        make_integrations(["tensorbord"])
    with pytest.raises(MissingDependencyError, match="needs `pip install comet-ml`"):
        make_integrations("comet_ml")
    assert make_integrations("none") == make_integrations(None) == make_integrations([]) == []


class StopsAfter(SearchCallback):
    """Ctrl-C after some trials."""

    def __init__(self, num: int) -> None:
        self.num = num

    def on_trial_end(self, trial, progress):
        if progress.num_told == self.num:
            raise KeyboardInterrupt


def test_a_real_search_reports_to_tensorboard_and_draws_nothing_in_a_pipe(tiny_llama, tmp_path, capfd):
    def make(*callbacks: SearchCallback) -> AutoQRASearcher:
        return AutoQRASearcher(
            tiny_llama(),
            train_dataset=token_dataset(seed=0),
            eval_dataset=token_dataset(seed=1),
            processing_class=word_tokenizer(),
            args=SFTConfig(
                output_dir=str(tmp_path / "sft"), per_device_train_batch_size=2, max_length=16, max_steps=4,
                use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="tensorboard",
            ),
            search_config=AutoQRASearchConfig(
                output_dir=str(tmp_path / "out"), rank_choices=[0, 2, 4], num_calibration_sequences=4,
                num_eval_sequences=4, max_cost=1000.0, max_trials=6, num_seeds=1,
            ),
            callbacks=callbacks,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        make(StopsAfter(2)).run()
    result = make().run()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    scalars = _scalars(run)
    assert scalars["eval/loss"] == [(n, pytest.approx(t.loss, rel=1e-5)) for n, t in enumerate(result.trials, 1)]
    assert scalars["train/cost"][-1][1] == pytest.approx(result.cost, rel=1e-5)
    assert scalars["train/total_bytes"][0][1] == pytest.approx(result.trials[0].total_bytes, rel=1e-5)
    assert scalars["eval/winner_loss"][0][1] == pytest.approx(result.winner.loss, rel=1e-5)
    captured = capfd.readouterr()  # datasets draws bars wherever it writes to
    assert captured.out == ""
    assert not any(word in captured.err for word in ("searching", "calibrating", "scoring"))


def test_a_missing_tracker_is_named_before_the_model_is_loaded(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), report_to=["comet_ml"], use_cpu=True, bf16=False)
    with pytest.raises(MissingDependencyError, match="pip install comet-ml"):
        AutoQRASearcher("no-such-model", train_dataset=None, eval_dataset=None, args=args)
