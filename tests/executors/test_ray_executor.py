"""A cluster of two workers on this machine: whole searches, with a worker that is killed and one that hangs."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest
import ray
import yaml

from peft_autoqra import BitRankPlan, cli
from peft_autoqra.errors import ExecutorError
from peft_autoqra.executors.arguments import ExecutorArguments
from peft_autoqra.executors.make_executor import make_executor
from peft_autoqra.executors.ray_executor import RayExecutor
from peft_autoqra.executors.ray_worker import RayTrialWorker
from peft_autoqra.executors.worker_files import WorkerFiles
from peft_autoqra.search_callback import SearchCallback
from peft_autoqra.trial import TrialResult, TrialStatus
from tests.conftest import REPOSITORY
from tests.evaluation.tiny_questions import questions
from tests.executors.conftest import check_counted_once, outcomes
from tests.executors.logit_objective import mean_logits
from tests.executors.misfortunes import Misfortune, UnseenFiles
from tests.tiny_folder import SEARCH_FLAGS, make_tiny_folder

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def cluster():
    """Four CPUs and a GPU that is there by name only."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token to the home folder
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=4,
            num_gpus=1,
            include_dashboard=False,
            object_store_memory=80_000_000,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
        )
        yield ray
        ray.shutdown()


class Watch(SearchCallback):
    """Counts what is heard of trials, and does something when one begins or ends."""

    def __init__(self, on_begin=lambda trial: None, on_end=lambda trial: None) -> None:
        self.begun, self.ended, self.most_pending = [], [], 0
        self._on_begin, self._on_end = on_begin, on_end

    def on_trial_begin(self, trial, progress):
        self.begun.append(trial.number)
        self.most_pending = max(self.most_pending, progress.num_running)
        self._on_begin(trial)

    def on_trial_end(self, trial, progress):
        self.ended.append(trial.number)
        self._on_end(trial)


def test_one_worker_is_killed_half_way_and_one_hangs(cluster, make_searcher, tiny_llama, whole, tmp_path):
    """Two at most share the GPU. The killed one's trial is made good elsewhere; the other's took too long."""
    file = tmp_path / "misfortune"

    def strike(trial):
        while trial.number == 0 and executor.num_slots < 2:  # both are there from the beginning
            assert executor._collect() == []
        if trial.number in (4, 6):
            file.write_text("die" if trial.number == 4 else "hang")

    watch, model = Watch(on_begin=strike), tiny_llama()
    model.model.layers[-1].register_forward_pre_hook(Misfortune(file))
    executor = RayExecutor(gpus_per_worker=0.5, grace_seconds=0.5)
    result = make_searcher(tmp_path, model, [watch], max_trial_seconds=15.0).run(executor)
    check_counted_once(result)
    assert len(result.trials) == 9
    assert sorted(watch.begun) == list(range(9))
    assert watch.ended == [trial.number for trial in result.trials]
    assert watch.most_pending == 2
    (failed,) = [trial for trial in result.trials if trial.result.status is TrialStatus.FAILED]
    assert "longer than 15 seconds (max_trial_seconds) and could not be stopped; its worker was" in failed.result.error
    baselines = [outcome for outcome in sorted(outcomes(result.trials)) if outcome[1].startswith("baseline")]
    assert baselines == [outcome for outcome in whole if outcome[1].startswith("baseline")]
    assert ray.is_initialized()  # it was there before
    assert not list(tmp_path.glob("workers-*"))


class OnOtherMachines(RayExecutor):
    """Its workers do not see the search's folders."""

    def open(self, source):
        class Elsewhere:
            max_trial_seconds, weight_bytes, needs_gpu = None, source.weight_bytes, False
            files = UnseenFiles(Path("/nowhere/workers"), Path("/nowhere/bank"), source.files)

        super().open(Elsewhere())


def test_interrupted_on_machines_without_the_folders_and_resumed_in_one_process(
    cluster, make_searcher, whole, tmp_path
):
    def interrupt(trial):
        if trial.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_searcher(tmp_path, callbacks=[Watch(on_end=interrupt)]).run(
            OnOtherMachines(num_workers=2), deterministic=True
        )
    result = make_searcher(tmp_path).run(deterministic=True)
    assert outcomes(result.trials) == whole
    check_counted_once(result)


def test_a_function_decides_on_machines_without_the_folders(cluster, make_searcher, tmp_path):
    settings = {"data": (questions(seed=1), questions(seed=2)), "judge": mean_logits, "max_trials": 4}
    result = make_searcher(tmp_path / "ray", **settings).run(OnOtherMachines(num_workers=2), deterministic=True)
    assert not [trial.result.error for trial in result.trials if trial.result.error]
    assert outcomes(result.trials) == outcomes(
        make_searcher(tmp_path / "one", **settings).run(deterministic=True).trials
    )


def test_files_through_the_object_store(cluster, make_searcher, tmp_path):
    """The same as above of one worker, in this process."""
    searcher = make_searcher(tmp_path)
    with searcher.opened():
        (trial,) = searcher.ask()
        source = searcher._worker_source()
        executor = RayExecutor()
        executor._source = source
        executor._ship()
        worker = RayTrialWorker()
        worker.prepare(WorkerFiles(Path("/nowhere"), Path("/nowhere")), executor._shipped, 1, 0.0)
        result = TrialResult.from_dict(worker.evaluate(trial.to_dict()))
        source.close()
        own = source.evaluator().evaluate(trial.plan, trial.fidelity)
        assert result.sequence_losses == own.sequence_losses
        source.close()


def test_a_cluster_that_has_no_room_ends_the_search_which_goes_on_later(cluster, make_searcher, tmp_path):
    searcher = make_searcher(tmp_path)
    executor = RayExecutor(cpus_per_worker=64, start_timeout_seconds=0.1)
    with pytest.raises(ExecutorError, match=r"No worker is left.*Each needs 64 CPU, .* memory; the cluster has \{"):
        searcher.run(executor)
    assert make_searcher(tmp_path, max_trials=9).run().winner.loss is not None


@pytest.mark.slow
def test_workers_that_cannot_load_end_the_search(cluster, make_searcher, tmp_path):
    class WithoutModel(RayExecutor):
        def open(self, source):
            (source.files.folder / "setup.pt").unlink()
            super().open(source)

    with pytest.raises(ExecutorError, match="could not begin: A worker cannot load the model"):
        make_searcher(tmp_path).run(WithoutModel(num_workers=1))


def test_settings_are_checked(cluster):
    for changes in ({"num_workers": 0}, {"cpus_per_worker": 0}, {"gpus_per_worker": -1.0}):
        with pytest.raises(ExecutorError, match="must be at least 1"):
            RayExecutor(**changes)
    args = ExecutorArguments(executor="ray", num_workers=3, gpus_per_worker=0.5, cpus_per_worker=2)
    executor = make_executor(args)
    assert (executor._num_workers, executor._gpus, executor._cpus) == (3, 0.5, 2)
    executor.close()
    assert ray.is_initialized()


@pytest.mark.slow
def test_the_command(cluster, tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tiny = make_tiny_folder(tmp_path, tiny_llama())
    flags = ["--executor", "ray", "--ray_address", "auto", "--num_workers", "2", "--deterministic"]
    assert cli.main(["search", *tiny.flags, *SEARCH_FLAGS, *flags, "--output_dir", str(tmp_path / "ray")]) == 0
    argv = ["search", *tiny.flags, *SEARCH_FLAGS, "--deterministic", "--output_dir", str(tmp_path / "one")]
    assert cli.main(argv) == 0
    plans = [BitRankPlan.from_pretrained(tmp_path / name / "plan") for name in ("ray", "one")]
    assert plans[0] == plans[1]
    assert yaml.safe_load((tmp_path / "ray" / "recipe.yaml").read_text())["num_workers"] == 2
    assert "Traceback" not in capsys.readouterr().err
