"""The installed command, in processes of its own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import peft_autoqra
from peft_autoqra import cli
from peft_autoqra.commands import show
from peft_autoqra.errors import HubError, SearchBudgetError, UnreachableBudgetError
from tests.commands.plans import layered_plan
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "botorch", "matplotlib", "scipy")


def entry_point() -> tuple[str, str]:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["autoqra"].split(":")
    return module, function


def console(*argv: str, after: str = "pass", **settings):
    """What pip's script of the entry point does."""
    module, function = entry_point()
    code = f"import sys; from {module} import {function}; status = {function}(); {after}; sys.exit(status)"
    settings = {"capture_output": True, "text": True, "timeout": 120, "cwd": REPOSITORY} | settings
    return subprocess.run([sys.executable, "-c", code, *argv], check=False, **settings)


def test_light_commands_start_without_heavy_imports(tmp_path):
    layered_plan().save_pretrained(tmp_path / "a")
    after = f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    for argv in (
        ["--help"],
        ["--version"],
        ["search", "--help", "fine-tune"],
        ["completion", "bash"],
        ["show", str(tmp_path / "a")],
        ["compare", str(tmp_path / "a"), str(tmp_path / "a")],
    ):
        done = console(*argv, after=after)
        assert (done.returncode, done.stderr.strip()) == (0, "[]"), argv
        assert done.stdout


def test_commands_that_load_models_register_the_method():
    module, _ = entry_point()
    code = f"""
import {module}, sys
sys.argv[1:] = ["push", "nowhere", "--repo_id", "me/x"]
assert {module}.main() == 2
import peft_autoqra
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is peft_autoqra.QuantLoRAModel
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_registers_the_method():
    """As this process did, and as processes do that the command starts: they import its module and run none of it."""
    assert not importlib.import_module(entry_point()[0]).is_running
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is peft_autoqra.QuantLoRAModel
    assert "autoqra" in AUTO_QUANTIZER_MAPPING


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    layered_plan().save_pretrained(tmp_path)
    read, write = os.pipe()
    os.close(read)
    done = console("show", str(tmp_path), capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.EXIT_BROKEN_PIPE, "")


def test_errors_are_json_too(tmp_path):
    done = console("show", str(tmp_path), "--json")
    document = json.loads(done.stdout)
    assert done.returncode == document["error"]["exit_code"] == 2
    assert document["command"] == "show"
    assert document["error"]["type"] == "InvalidPlanError"
    assert str(tmp_path) in document["error"]["message"]
    assert done.stderr.startswith("autoqra show: ")
    assert json.loads(console("serch", "--json").stdout)["error"]["type"] == "UsageError"


def test_nothing_else_gets_into_the_document(tmp_path):
    """Neither what Python prints nor what other code writes to the process's stdout."""
    layered_plan().save_pretrained(tmp_path)
    module, function = entry_point()
    code = f"""
import os, sys
import {module}
{module}.is_running = True
from peft_autoqra.commands import show
find = show.find_plan
def noisy(source):
    print("progress")
    os.write(1, b"compiler\\n")
    return find(source)
show.find_plan = noisy
sys.exit({module}.{function}())
"""
    argv = [sys.executable, "-c", code, "show", str(tmp_path), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert json.loads(done.stdout)["command"] == "show"
    assert sorted(done.stderr.split()) == ["compiler", "progress"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnreachableBudgetError("too small"), 3),
        (SearchBudgetError("too small"), 3),
        (HubError("no access"), 4),
        (FileNotFoundError("gone"), 2),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_exit_codes(capsys, monkeypatch, error, code, as_json):
    def fail(argv):
        raise error

    monkeypatch.setattr(show, "run", fail)
    assert cli.main(["show", "plan", *(["--json"] if as_json else [])]) == code
    captured = capsys.readouterr()
    assert ("Traceback" in captured.err) is (code == 1)
    assert captured.err.splitlines()[-1].startswith("autoqra show: ")
    assert "--json" not in captured.out
    if as_json:
        details = json.loads(captured.out)["error"]
        assert (details["type"], details["exit_code"]) == (type(error).__name__, code)
    else:
        assert captured.out == ""


def test_one_process_of_a_distributed_run_writes_the_document(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["show", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_every_name_of_the_package_is_there():
    assert set(peft_autoqra.__all__) <= set(dir(peft_autoqra))
    for name in peft_autoqra.__all__:
        thing = getattr(peft_autoqra, name)
        assert callable(thing)
        assert thing.__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = peft_autoqra.nothing
