"""How a process finds out what it is one of; what two real ones do is in tests/distributed."""

from __future__ import annotations

import os

import pytest
from trl import SFTConfig

from peft_autoqra.distribution import Distribution, DistributionError, every_process_reads, find_distribution
from peft_autoqra.errors import InvalidPlanError


@pytest.fixture
def args(tmp_path) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)


def test_a_process_alone(args):
    assert find_distribution(args) == Distribution(strategy="single", num_processes=1, process_index=0)


def test_processes_that_do_not_know_of_each_other_are_refused(args, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributionError, match=r"started 2 processes.*use_cpu: true"):
        find_distribution(args)


def test_several_gpus_in_one_process_are_refused(args):
    args._n_gpu = 4
    with pytest.raises(DistributionError, match=r"sees 4 GPUs.*ddp.yaml.*CUDA_VISIBLE_DEVICES=0"):
        find_distribution(args)


@pytest.mark.parametrize("version", [None, "1"])
def test_fsdp1_is_refused_and_is_what_accelerate_takes_without_a_version(args, monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(DistributionError, match=r"FSDP1 joins.*fsdp2.yaml"):
        find_distribution(args)


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_of_the_recipe_counts_too(tmp_path, version):
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, fsdp=True, fsdp_config={"version": version},
        gradient_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(DistributionError, match="FSDP1" if version == 1 else "not over CPUs"):
        find_distribution(args)


def test_every_process_reads_tells_transformers(args, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    distribution = Distribution(strategy="fsdp2", num_processes=2, first_process_reads=True)
    changed = every_process_reads(distribution, args)
    assert changed == Distribution(strategy="fsdp2", num_processes=2)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_what_is_shared_with_nobody_is_just_made():
    alone = Distribution()
    assert alone.shared(lambda: 3) == alone.by_main_process(lambda: 3) == 3
    error = InvalidPlanError("no such plan")

    def fail() -> None:
        raise error

    with pytest.raises(InvalidPlanError) as caught:
        alone.shared(fail)
    assert caught.value is error
