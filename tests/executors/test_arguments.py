"""What a recipe says of workers."""

from __future__ import annotations

import sys
from functools import cache

import datasets
import pytest

from peft_autoqra import AutoQRASearcher, cli
from peft_autoqra.commands import search
from peft_autoqra.errors import ExecutorError, MissingDependencyError
from peft_autoqra.executors import ray_executor
from peft_autoqra.executors.arguments import ExecutorArguments
from peft_autoqra.executors.in_process import InProcessExecutor
from peft_autoqra.executors.make_executor import make_executor
from peft_autoqra.recipe import RecipeError
from tests.tiny_folder import SEARCH_FLAGS, make_tiny_folder


def test_by_default_there_is_one_process():
    assert isinstance(make_executor(ExecutorArguments()), InProcessExecutor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "slurm"}, "'slurm' must be in_process or ray"),
        ({"num_workers": 2}, "num_workers: one process has no workers; set executor to ray"),
        ({"ray_address": "auto", "gpus_per_worker": 0.5}, "ray_address, gpus_per_worker: one process"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(RecipeError, match=message):
        ExecutorArguments(**settings)


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'peft-autoqra\[ray\]'"):
        make_executor(ExecutorArguments(executor="ray"))


def test_no_cluster_at_the_address(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))  # of others here
    with pytest.raises(ExecutorError, match=r"no Ray cluster at 'auto' .*ray start --head"):
        ray_executor.RayExecutor(address="auto")


def test_the_command_hands_them_on(monkeypatch, capsys, tmp_path, tiny_llama):
    seen = []

    def run(self, executor, *, deterministic):
        seen.append((executor, deterministic))
        raise ExecutorError("no worker today")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(search, "make_executor", lambda args: args)
    monkeypatch.setattr(AutoQRASearcher, "run", run)
    flags = ["--executor", "ray", "--num_workers", "3", "--gpus_per_worker", "0.5", "--deterministic"]
    tiny = make_tiny_folder(tmp_path, tiny_llama())
    argv = ["search", *tiny.flags, *SEARCH_FLAGS, *flags, "--output_dir", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    args = ExecutorArguments(executor="ray", num_workers=3, gpus_per_worker=0.5, deterministic=True)
    assert seen == [(args, True)]
    assert "no worker today" in capsys.readouterr().err


def test_mistakes_are_one_line(capsys):
    assert cli.main(["search", "--num_workers", "2"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "autoqra search: num_workers: one process has no workers; set executor to ray."
    ]
