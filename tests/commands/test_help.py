"""Help fits a screen, names units and defaults, and says what the parsers do."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from trl import SFTConfig

from peft_autoqra import cli
from peft_autoqra.commands.command_parser import HelpFormatter
from peft_autoqra.commands.help_pages import EXIT_CODES, command_page, recipe_command_parser, topics_of
from peft_autoqra.commands.parser import RecipeParser
from peft_autoqra.commands.recipe_flags import TRAINING_FLAGS
from peft_autoqra.commands.registry import COMMANDS
from tests.commands.plans import documentation

RECIPE_COMMANDS = [name for name, command in COMMANDS.items() if command.topics]
PAGES = [
    [],
    *([name] for name in COMMANDS),
    *([name, topic.name] for name in RECIPE_COMMANDS for topic in topics_of(COMMANDS[name])),
]
UNITS = re.compile(
    r"bytes|bits|seconds|tokens|epochs|fraction|factor|number|rank|full fine-tunes|per optimizer step|scale of",
    re.IGNORECASE,
)


def flags_of(name: str):
    parser = COMMANDS[name].parser
    actions = (parser() if parser else recipe_command_parser(name))._actions
    return [action for action in actions if action.option_strings]


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_pages_fit_a_screen(capsys, words):
    assert cli.main(["help", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 3 < len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_both_ways_to_ask_for_help(capsys, words):
    name, topic = words[:1], words[1:]
    assert cli.main([*name, "--help", *topic]) == cli.main(["help", *words]) == 0
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :]


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_name_units_and_defaults(name):
    formatter = HelpFormatter("autoqra")
    for action in flags_of(name):
        text = formatter._get_help_string(action)
        assert text[0].isupper() or text.startswith(("native", "plain-lora", "merged")), text
        if action.dest != "help" and not action.required:
            assert "default" in text or re.search(r"\[.+\]$", text), f"{action.dest} names no default: {text}"
        if action.metavar in ("N", "X"):
            assert UNITS.search(text), f"{action.dest} names no unit: {text}"


@pytest.mark.parametrize("name", RECIPE_COMMANDS)
def test_help_agrees_with_the_parser_of_recipes(name):
    real = {action.dest: action for action in RecipeParser(name)._actions if "--no_" not in action.option_strings[0]}
    shown = {action.dest: action for action in flags_of(name) if action.dest not in ("json", "help")}
    of_trl = {field.name for field in fields(SFTConfig)}
    assert set(real) - set(shown) == of_trl - set(shown)
    wanted = {flag for topic in COMMANDS[name].topics for flag in topic.training_flags}
    assert set(shown) & of_trl >= (wanted or set(TRAINING_FLAGS))
    assert set(shown) <= set(real)
    for dest, action in shown.items():
        default = real[dest].default
        assert getattr(default, "value", default) == action.default, dest
        if action.choices is not None and real[dest].choices is not None:
            assert list(action.choices) == list(real[dest].choices), dest


def test_all_lists_every_field_of_trl():
    page = command_page("train", "all")
    assert "--weight_decay" in page
    assert "--train_file" in page
    assert "--weight_decay" not in command_page("train", "fine-tune")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_main_page_names_commands_and_exit_codes(capsys, argv):
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert all(re.search(rf"^ +{code}  \w", text, re.MULTILINE) for code in EXIT_CODES)


def test_the_documentation_has_all_commands_and_exit_codes():
    text = documentation()
    assert re.findall(r"^\| `(\w+)` \| \w+s ", text, re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)` \|", text.split("## ")[0], re.MULTILINE)) == set(COMMANDS)
    codes = dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE))
    assert {int(code): meaning.replace("\\|", "|") for code, meaning in codes.items()} == EXIT_CODES


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serch"], "'serch' is no command. Did you mean search?"),
        (["zzz"], "Use one of search, train"),
        (["help", "pusch"], "Did you mean push?"),
        (["search", "--help", "modle"], "Did you mean model?"),
        (["show", "plan", "--colour", "never"], "'--colour' is unknown. Did you mean --color?"),
        (["push", "folder"], "--repo_id"),
        (["show", "plan", "--color", "pink"], "pink"),
    ],
)
def test_mistyped_words_get_suggestions(capsys, argv, words):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
