"""Completion scripts, in a real bash where there is one."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from peft_autoqra import cli
from peft_autoqra.commands.completion import completion_script
from peft_autoqra.commands.registry import COMMANDS

# What bash does when Tab is pressed: it looks the function up and calls it.
PRESS_TAB = """
source "$1"; shift
function=$(complete -p autoqra | sed -n 's/.*-F \\([^ ]*\\) .*/\\1/p')
COMP_WORDS=(autoqra "$@"); COMP_CWORD=$#
"$function" autoqra "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "autoqra"
    path.write_text(completion_script("bash"))
    return path


@pytest.fixture
def press_tab(script, tmp_path):
    def press(*words: str) -> set[str]:
        command = ["bash", "--norc", "--noprofile", "-c", PRESS_TAB, "bash", str(script), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=30)
        return set(done.stdout.split())

    return press


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
class TestBash:
    def test_commands(self, press_tab):
        assert press_tab("s") == {"search", "show"}
        assert press_tab("") >= {*COMMANDS, "help"}

    def test_flags(self, press_tab):
        assert press_tab("search", "--mem") == {"--memory_budget"}
        assert press_tab("train", "--config", "recipe.yaml", "--lora_d") == {"--lora_dropout"}
        assert press_tab("push", "folder", "--repo") == {"--repo_id"}
        assert press_tab("train", "--memory_b") == set()

    def test_values(self, press_tab):
        assert press_tab("search", "--granularity", "") == {"module", "fused", "block", "layer"}
        assert press_tab("export", "folder", "--to", "m") == {"merged"}
        assert press_tab("search", "--help", "mo") == {"model"}

    def test_files_and_folders(self, press_tab, tmp_path):
        (tmp_path / "plan-a").mkdir()
        (tmp_path / "plan.yaml").touch()
        assert press_tab("show", "pla") == {"plan-a"}
        assert press_tab("train", "--plan", "pla") == {"plan-a"}
        assert press_tab("evaluate", "pla") == {"plan-a"}
        assert press_tab("evaluate", "plan-a", "--output_file", "pla") == {"plan.yaml", "plan-a"}
        assert press_tab("report", "plan-a", "--output", "pla") == {"plan.yaml", "plan-a"}
        assert press_tab("search", "--config", "pla") == {"plan.yaml", "plan-a"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_every_shell_has_a_script(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "memory_budget" in text or shell == "tcsh"
    assert "compare" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True, timeout=30)


def test_another_shell_is_refused(capsys):
    assert cli.main(["completion", "cmd"]) == 2
    assert "bash" in capsys.readouterr().err
