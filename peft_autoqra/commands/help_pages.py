"""What ``--help`` prints: a page for the program, for every command, and for every topic of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version

from peft_autoqra.commands.command_parser import HelpFormatter, close_names
from peft_autoqra.commands.recipe_flags import Topic, recipe_parser_for_help
from peft_autoqra.commands.registry import COMMANDS, Command
from peft_autoqra.errors import UsageError

ALL = "all"
"""The topic that holds every flag, those of ``SFTConfig`` included: long, and slow to import."""
OPTIONS = Topic(name="options", summary="--config, --dry_run and what else all commands have", arguments=None)
EXIT_CODES = {
    0: "all went well",
    1: "a defect of the program; its traceback is on stderr",
    2: "wrong usage or input: flags, recipe, data, model, plan, folder",
    3: "the memory budget or max_cost is too small for any plan",
    4: "the hub refuses, or cannot be reached",
    130: "interrupted (Ctrl+C)",
    141: "whoever read the output went away (as in `| head`)",
}
_HELP_FLAGS = ("-h", "--help")


def requested_page(arguments: Sequence[str]) -> str | None:
    """The page that the command line asks for; None where it asks for a command to be run.

    Args:
        arguments: without the program's name.

    Raises:
        UsageError: help on an unknown command or topic.
    """
    if not arguments or arguments[0] in _HELP_FLAGS:
        return main_page()
    if arguments[0] == "--version":
        return f"autoqra {version('peft-autoqra')}"
    if arguments[0] == "help":
        words = [word for word in arguments[1:] if word not in _HELP_FLAGS]
        return command_page(*words[:2]) if words else main_page()
    asked = next((place for place, argument in enumerate(arguments) if argument in _HELP_FLAGS), None)
    if asked is None:
        return None
    following = arguments[asked + 1 : asked + 2]
    return command_page(arguments[0], *(word for word in following if not word.startswith("-")))


def main_page() -> str:
    """All commands."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items())
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    return f"""\
usage: autoqra COMMAND [--FLAG VALUE ...]

{commands}

`autoqra COMMAND --help` lists its flags. Settings of search, train, evaluate and calibrate may also
stand in a YAML recipe (--config). --dry_run says what a long command would do, --json prints one
JSON document for programs.

  autoqra search --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
      --train_file data.jsonl --test_split_size 0.1 --memory_budget qlora-4bit-r16
  autoqra show search-out
  autoqra train --config search-out/recipe.yaml --plan search-out/plan --output_dir adapter
  autoqra push adapter --repo_id me/my-adapter

exit codes:
{codes}"""


def known_command(name: str) -> Command:
    """A command by its name.

    Raises:
        UsageError: there is no such command.
    """
    if name not in COMMANDS:
        hint = close_names(name, COMMANDS) or f" Use one of {', '.join(COMMANDS)}."
        raise UsageError(f"{name!r} is no command.{hint}")
    return COMMANDS[name]


def topics_of(command: Command) -> tuple[Topic, ...]:
    """The topics that have a page; none where one page holds all flags."""
    return (*command.topics, OPTIONS) if command.topics else ()


def command_page(name: str, topic: str | None = None) -> str:
    """Flags of a command: all of one without topics; of others the most used ones, or those of a topic.

    Args:
        name: of the command.
        topic: or ``"all"``.

    Raises:
        UsageError: there is no such command or topic.
    """
    command = known_command(name)
    if command.parser is not None:
        return command.parser().format_help().rstrip()  # a topic after --help is a value of another flag
    if topic is None:
        return _first_page(name, command)
    if topic == ALL:
        return _full_page(name)
    names = [each.name for each in topics_of(command)]
    if topic not in names:
        hint = close_names(topic, names) or f" Use one of {', '.join([*names, ALL])}."
        raise UsageError(f"{topic!r} is no topic of `autoqra {name} --help`.{hint}")
    parser = _recipe_parser(command)
    formatter = HelpFormatter(prog=f"autoqra {name}")
    formatter.start_section(f"autoqra {name}, {topic}")
    formatter.add_arguments(_group(parser, topic)._group_actions)
    formatter.end_section()
    return formatter.format_help().rstrip()


def recipe_command_parser(name: str) -> argparse.ArgumentParser:
    """All flags that the pages of a command with a recipe show, for completion."""
    return _recipe_parser(COMMANDS[name])


def _recipe_parser(command: Command) -> argparse.ArgumentParser:
    return recipe_parser_for_help(command.topics, command.output_dir)


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    return next(group for group in reversed(parser._action_groups) if group.title == title)


def _first_page(name: str, command: Command) -> str:
    parser = _recipe_parser(command)
    formatter = HelpFormatter(prog=f"autoqra {name}")
    formatter.add_usage(f"autoqra {name} {command.usage}", [], [])
    formatter.add_text(command.description)
    actions = {action.dest: action for action in parser._actions}
    formatter.start_section("most used")
    formatter.add_arguments([actions[flag] for flag in command.most_used])
    formatter.end_section()
    topics = [*((topic.name, topic.summary) for topic in topics_of(command)), (ALL, "every flag (long)")]
    width = max(len(topic) for topic, _ in topics)
    lines = "\n".join(f"  {topic.ljust(width)}  {summary}" for topic, summary in topics)
    return f"{formatter.format_help().rstrip()}\n\ntopics, each with `autoqra {name} --help TOPIC`:\n{lines}"


def _full_page(name: str) -> str:
    """Of TRL's own parser."""
    from peft_autoqra.commands.parser import RecipeParser  # noqa: PLC0415 -- imports TRL, which takes seconds

    return str(RecipeParser(name).format_help()).rstrip()
