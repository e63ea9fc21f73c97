"""``autoqra completion``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import shtab

from peft_autoqra.commands.folder_parsers import completion_parser
from peft_autoqra.commands.help_pages import ALL, recipe_command_parser, topics_of
from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.registry import COMMANDS, Command

_FILES, _FOLDERS = ("FILE", "PATH"), ("DIR", "FOLDER", "PLAN", "A", "B", "MODEL", "ID_OR_DIR")
_PATHS = {**dict.fromkeys(_FILES, shtab.FILE), **dict.fromkeys(_FOLDERS, shtab.DIRECTORY)}
"""Metavariables of what is completed with names of files or folders."""


def run(argv: Sequence[str]) -> Outcome:
    """Make the script of a shell.

    Raises:
        AutoQRAError: no shell that is known.
    """
    shell = completion_parser().parse_args(argv).shell
    script = completion_script(shell)
    return Outcome(script, {"shell": shell, "script": script})


def completion_script(shell: str) -> str:
    """A script that runs nothing of ours: it lists commands and the flags that their help shows.

    Args:
        shell: such as ``"bash"``.
    """
    return str(shtab.complete(_whole_parser(), shell=shell))


def _whole_parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="autoqra")
    whole.add_argument("--version", action="store_true", help="Print the version.")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, parents=[_parser(name, command)], add_help=False)
    on = commands.add_parser("help", help="list commands, or the flags of one", add_help=False)
    on.add_argument("command", choices=tuple(COMMANDS))
    on.add_argument("topic", nargs="?", choices=_topics({t for c in COMMANDS.values() for t in _names(c)}))
    return whole


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    if command.parser is not None:
        parser: argparse.ArgumentParser = command.parser()
    else:
        parser = recipe_command_parser(name)
        if command.positional:
            parser.add_argument(command.positional.lower(), metavar=command.positional)
        help_action = next(action for action in parser._actions if action.dest == "help")
        help_action.nargs, help_action.choices = "?", _topics(_names(command))
    for action in parser._actions:
        if action.metavar in _PATHS:
            action.complete = _PATHS[str(action.metavar)]  # type: ignore[attr-defined]
    return parser


def _names(command: Command) -> set[str]:
    return {topic.name for topic in topics_of(command)}


def _topics(names: set[str]) -> tuple[str, ...]:
    return (*sorted(names), ALL)
