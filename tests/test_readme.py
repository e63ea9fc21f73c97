"""README.md files that others write too."""

from __future__ import annotations

import os
import time

import pytest
from huggingface_hub import ModelCard, metadata_load

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.readme import BEGIN, END, HubMetadata, has_section, hub_id, read_card, update_readme

METADATA = HubMetadata(
    library_name="peft",
    tags=("autoqra", "lora"),
    base_model="someone/some-model",
    base_model_relation="adapter",
    pipeline_tag="text-generation",
)
SECTION = "## Ours\n\nsome `text`"
MINE = """---
license: mit
tags:
- mine
- lora
pipeline_tag: summarization
---
# My model

What it is.

```bash
## not a heading
```

## Results

Fine.
"""


def update(directory, section=SECTION, **changes):
    update_readme(directory, "A title", section, HubMetadata(**(vars(METADATA) | changes)))
    return (directory / "README.md").read_bytes().decode()


def test_a_new_file(tmp_path):
    text = update(tmp_path)
    assert metadata_load(tmp_path / "README.md") == {
        "library_name": "peft",
        "tags": ["autoqra", "lora"],
        "base_model": "someone/some-model",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
    }
    assert text.split("---\n")[2] == f"\n# A title\n\n{BEGIN}\n{SECTION}\n{END}\n"


def test_what_others_wrote_stays(tmp_path):
    (tmp_path / "README.md").write_text(MINE)
    text = update(tmp_path)
    body = MINE.split("---\n")[2]
    assert text.split("---\n")[2] == "\n" + body.replace("## Results", f"{BEGIN}\n{SECTION}\n{END}\n\n## Results")
    header = metadata_load(tmp_path / "README.md")
    assert (header["license"], header["pipeline_tag"]) == ("mit", "summarization")
    assert header["tags"] == ["mine", "lora", "autoqra"]


@pytest.mark.parametrize("before", [None, MINE, "no header", "---\nlicense: mit\n---\n\n\n", "# Only a title\n"])
def test_writing_again_changes_nothing_and_another_section_takes_its_place(tmp_path, before):
    if before is not None:
        (tmp_path / "README.md").write_text(before)
    first = update(tmp_path)
    assert update(tmp_path) == first
    other = update(tmp_path, "## Other \\1 text")
    assert other == first.replace(SECTION, "## Other \\1 text")
    assert update(tmp_path) == first


def test_text_around_the_section_may_change(tmp_path):
    text = update(tmp_path)
    mine = text.replace(BEGIN, f"Before.\n\n{BEGIN}").replace(END, f"{END}\n\nAfter.")
    (tmp_path / "README.md").write_text(mine)
    assert update(tmp_path, "new") == mine.replace(SECTION, "new")


def test_a_lost_end_marker_loses_no_text(tmp_path):
    text = update(tmp_path)
    (tmp_path / "README.md").write_text(text.replace(END, "Mine."))
    repaired = update(tmp_path)
    assert repaired.count(BEGIN) == repaired.count(END) == 1
    assert "Mine." in repaired.split(END)[1]
    assert update(tmp_path) == repaired


def test_line_endings_are_kept(tmp_path):
    (tmp_path / "README.md").write_bytes(MINE.replace("\n", "\r\n").encode())
    text = update(tmp_path)
    assert text.count("\n") == text.count("\r\n")
    assert SECTION.replace("\n", "\r\n") in text


@pytest.mark.parametrize(
    ("header", "base_model", "expected"),
    [
        ({}, None, None),
        ({"base_model": "someone/known"}, None, "someone/known"),
        ({"base_model": "/home/me/model"}, None, None),
        ({"base_model": ["someone/known", "./model"]}, None, ["someone/known"]),
        ({"base_model": "/home/me/model"}, "someone/ours", "someone/ours"),
        ({"base_model": ["someone/known", "./model"]}, "someone/ours", ["someone/known", "someone/ours"]),
        ({"base_model": ["someone/ours", "someone/known"]}, "someone/ours", ["someone/ours", "someone/known"]),
    ],
)
def test_base_models_are_hub_ids(tmp_path, header, base_model, expected):
    ModelCard(f"---\nlicense: mit\nbase_model: {header.get('base_model', '')}\n---\n").save(tmp_path / "README.md")
    update(tmp_path, base_model=base_model)
    found = metadata_load(tmp_path / "README.md")
    assert found.get("base_model") == expected
    assert found.get("base_model_relation") == ("adapter" if expected else None)


def test_tags_that_name_a_folder_go(tmp_path):
    tags = ["base_model:adapter:/home/me/model", "base_model:adapter:someone/known", "trl"]
    ModelCard(f"---\ntags: {tags}\n---\n").save(tmp_path / "README.md")
    update(tmp_path)
    assert metadata_load(tmp_path / "README.md")["tags"] == [*tags[1:], "autoqra", "lora"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe# latin",
        b"---\n- a\n- list\n---\n",
        b"---\na: [\n---\n",
        b"---\n1: a\n---\n",
        b"---\nmodel-index:\n- nothing\n---\n",
    ],
)
def test_a_file_that_cannot_be_understood_is_left_alone(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.warns(UserWarning, match=r"(?s)README\.md is left as it is.*[^.]\. Mend.*complete_model_card"):
        update_readme(tmp_path, "A title", SECTION, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_folder_of_that_name_is_left_alone(tmp_path):
    (tmp_path / "README.md").mkdir()
    with pytest.warns(UserWarning, match="left as it is"):
        update_readme(tmp_path, "A title", SECTION, METADATA)


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("gpt2", True),
        ("someone/some-model_1.5", True),
        ("", False),
        (None, False),
        ("/home/me/model", False),
        ("./model", False),
        ("../model", False),
        ("a/b/c", False),
        ("folder/", False),
        ("two words", False),
    ],
)
def test_hub_ids(name, is_id):
    assert hub_id(name) == (name if is_id else None)


def test_a_folder_that_exists_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("someone/model") is None


# ------------------------------------------------------------------------------------------------- made to do harm
BOMB = "a: &a [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 if i else ''}, *a{i - 1 if i else ''}]\n" for i in range(40))
HOSTILE = {
    "an alias bomb": f"---\n{BOMB}base_model: *a39\n---\n",
    "a bomb of merge keys": "---\na: &a {x: 1}\n"
    + "".join(f"k{i}: &k{i}\n  <<: [{', '.join([f'*k{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9))
    + "---\n",
    "deep": f"---\na: {'[' * 3000}{']' * 3000}\n---\n",
    "deep by indentation": "---\n" + "".join(" " * i + "a:\n" for i in range(1500)) + "---\n",
    "base_model: number": "---\nbase_model: 7\n---\n",
    "base_model: mapping": "---\nbase_model: {a: 1}\n---\n",
    "tags: number": "---\ntags: 5\n---\n",
    "tags: nested": "---\ntags: [[a], {b: 1}]\n---\n",
    "many tags": f"---\ntags: [{', '.join(map(hex, range(2000)))}]\n---\n",
    "a long header": "---\n" + "a: b\n" * 30000 + "---\n",
    "keys named like methods": "---\nself: 1\n---\n",
    "a long file": "# Title\n" + "word " * 300_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_at_once(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    started = time.process_time()
    with pytest.raises(InvalidPlanError, match=r"(?s)README\.md cannot be read.*mend or delete it"):
        read_card(tmp_path / "README.md")
    with pytest.warns(UserWarning, match="left as it is"):
        update_readme(tmp_path, "A title", SECTION, METADATA)
    assert time.process_time() - started < 2
    assert (tmp_path / "README.md").read_text() == text


def test_a_card_of_a_usual_size_is_read(tmp_path):
    results = "".join(f"- name: result{i}\n  value: [{i}, {{a: [b]}}]\n" for i in range(200))
    (tmp_path / "README.md").write_text(f"---\nbase_model: [a/b]\ntags: lora\nx:\n{results}---\n" + "word " * 1000)
    assert read_card(tmp_path / "README.md").data.tags == ["lora"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    with pytest.warns(UserWarning, match="no regular file"):
        update_readme(tmp_path, "A title", SECTION, METADATA)
    assert not has_section(tmp_path)


def test_links_out_of_the_folder_are_neither_read_nor_written_through(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.partial").symlink_to(tmp_path / "secret")
    update(folder)
    assert (tmp_path / "secret").read_text() == "secret"
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="link to a file outside"):
        update_readme(folder, "A title", SECTION, METADATA)
    assert (folder / "README.md").readlink() == tmp_path / "secret"
