"""The README's quickstart, typed as it stands there: from a model and a data file to an adapter on the hub."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
from peft import AutoPeftModelForCausalLM

from peft_autoqra import cli
from tests.conftest import TinyLlamaFactory
from tests.hub.conftest import ME, Hub
from tests.tiny_folder import RECIPE_FLAGS, SEARCH_FLAGS, make_tiny_folder

README = Path(__file__).parents[2] / "README.md"
TINY = {
    "search": [*RECIPE_FLAGS, *SEARCH_FLAGS],  # the last of two flags of a name counts
    "train": RECIPE_FLAGS,
}


def quickstart() -> list[list[str]]:
    """The commands in order, word by word."""
    text = README.read_text()
    section = text[text.index("## Quickstart") :]
    blocks = re.findall(r"^```bash\n(.*?)^```", section[: section.index("\n## ", 1)], re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_from_a_model_and_a_data_file_to_the_hub(
    hub: Hub, tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tiny = make_tiny_folder(tmp_path, tiny_llama())  # in ./model, as in the README
    shutil.copy(tiny.data / "train.jsonl", tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    hub.log_in(ME)
    commands = quickstart()
    assert [words[1] for words in commands] == ["search", "search", "show", "train", "evaluate", "report", "push"]
    for words in commands:
        assert words[0] == "autoqra"
        assert cli.main([*words[1:], *TINY.get(words[1], [])]) == 0, words
    assert (tmp_path / "search-out" / "report.html").exists()
    assert hub.server.repository("me/my-adapter").private
    assert AutoPeftModelForCausalLM.from_pretrained("me/my-adapter").peft_config["default"].bits_pattern
