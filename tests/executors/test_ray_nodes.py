"""A search while machines join a cluster and leave it."""

from __future__ import annotations

import logging

import pytest
import ray
from ray.cluster_utils import Cluster

from peft_autoqra.errors import ExecutorError
from peft_autoqra.executors.ray_executor import RayExecutor
from peft_autoqra.search_callback import SearchCallback
from peft_autoqra.trial import TrialStatus
from tests.conftest import REPOSITORY
from tests.executors.conftest import check_counted_once
from tests.executors.misfortunes import Pause

NODE = {"object_store_memory": 80_000_000, "memory": 1_000_000_000}


@pytest.fixture
def cluster(monkeypatch):
    """One machine without CPUs, for the search, and one with a CPU."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **NODE})
    cluster.add_node(num_cpus=1, **NODE)
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_machine_joins_and_the_first_one_leaves(cluster, make_searcher, tiny_llama, tmp_path):
    """The search begins on one machine, is on two, and ends on the one that joined."""
    (first,) = cluster.worker_nodes
    pause, model, events = tmp_path / "pause", tiny_llama(), []
    model.model.layers[-1].register_forward_pre_hook(Pause(pause))

    class Machines(SearchCallback):
        def on_trial_begin(self, trial, progress):
            if trial.number == 0:  # lasts until another one runs beside it
                pause.touch()
                cluster.add_node(num_cpus=1, **NODE)
                events.append("joined")
            elif progress.num_running == 2 and "left" not in events:
                cluster.remove_node(first, allow_graceful=False)
                pause.unlink()
                events.append("left")

    result = make_searcher(tmp_path, model, [Machines()]).run(RayExecutor())
    check_counted_once(result)
    assert events == ["joined", "left"]
    assert all(trial.result.status is TrialStatus.COMPLETED for trial in result.trials)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_machine_that_cannot_load_the_model_is_left_out(cluster, make_searcher, tiny_llama, tmp_path, caplog):
    pause, model = tmp_path / "pause", tiny_llama()
    model.model.layers[-1].register_forward_pre_hook(Pause(pause))

    class GoOn(logging.Handler):
        def emit(self, record):
            pause.unlink(missing_ok=True)

    class Damage(SearchCallback):
        def on_trial_end(self, trial, progress):
            if trial.number == 0:
                next(tmp_path.glob("workers-*/setup.pt")).unlink()
                pause.touch()
                cluster.add_node(num_cpus=1, **NODE)

    logger, handler = logging.getLogger("peft_autoqra.executors.ray_executor"), GoOn()
    logger.addHandler(handler)
    try:
        result = make_searcher(tmp_path, model, [Damage()]).run(RayExecutor())
    finally:
        logger.removeHandler(handler)
    check_counted_once(result)
    assert "A worker could not begin, and is left out: A worker cannot load the model" in caplog.text
    assert all(trial.result.status is TrialStatus.COMPLETED for trial in result.trials)


@pytest.mark.slow
def test_an_executor_that_started_its_cluster_serves_one_search(make_searcher, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    executor = RayExecutor(num_workers=1)
    executor.close()
    assert not ray.is_initialized()
    with pytest.raises(ExecutorError, match=r"cluster is gone, .*make a new RayExecutor"):
        make_searcher(tmp_path).run(executor)
