"""The files in examples/accelerate are what accelerate takes, and start what they say."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.distributed.conftest import REPOSITORY
from tests.distributed.scenarios import FSDP

FOLDER = REPOSITORY / "examples" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
GUIDE = "docs/training-on-several-devices.md"


def launch_variables(name: str, *flags: str) -> tuple[object, dict[str, str]]:
    """What ``accelerate launch`` makes of a file: its arguments, and the variables of the processes."""
    argv = ["--config_file", str(FOLDER / name), *flags, "scripts/finetune.py", "--config", "recipe.yaml"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it_and_the_guide_names_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / name))
    assert config.num_processes > 1
    text = (FOLDER / name).read_text()
    assert f"--config_file examples/accelerate/{name}" in text
    assert "# change" in text
    assert f"examples/accelerate/{name}" in (REPOSITORY / GUIDE).read_text()


@pytest.mark.parametrize("name", ["cpu_two_processes.yaml", "ddp.yaml"])
def test_ddp_goes_by_torchrun(name: str) -> None:
    arguments, variables = launch_variables(name)
    assert arguments.multi_gpu
    assert "ACCELERATE_USE_FSDP" not in variables
    assert arguments.main_process_port != 29500


def test_fsdp2_is_what_the_tests_run() -> None:
    arguments, variables = launch_variables("fsdp2.yaml")
    assert arguments.use_fsdp
    assert {name: variables[name] for name in FSDP} == FSDP
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).distributed_type is DistributedType.FSDP


def test_several_machines_meet_at_the_first() -> None:
    arguments, variables = launch_variables("multi_node_fsdp2.yaml", "--machine_rank", "1")
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")
    assert {name: variables[name] for name in FSDP} == FSDP


def test_these_are_all() -> None:
    assert FILES == ["cpu_two_processes.yaml", "ddp.yaml", "fsdp2.yaml", "multi_node_fsdp2.yaml"]
