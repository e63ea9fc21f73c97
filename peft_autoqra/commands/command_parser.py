"""Flags of one command: mistakes are one line, and help names every default."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from peft_autoqra.errors import UsageError

HELP_WIDTH = 100


def close_names(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant, as a sentence; empty where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


class HelpFormatter(argparse.HelpFormatter):
    """Fits a terminal of 100 columns, names every default, and spells each flag once."""

    def __init__(self, prog: str) -> None:
        """Fixed, so that help is the same everywhere."""
        super().__init__(prog, max_help_position=32, width=HELP_WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        flags = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")] or action.option_strings
        if action.nargs == 0:
            return ", ".join(flags)
        return f"{', '.join(flags)} {self._format_args(action, _metavar(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.required or action.default is argparse.SUPPRESS:
            return text
        if action.default in (None, []):
            return text if "default" in text else f"{text} [none]"
        return f"{text} [{_spelled(action.default).replace('%', '%%')}]"


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(getattr(value, "value", value))


class CommandParser(argparse.ArgumentParser):
    """Of a command that takes no recipe.

    Args:
        command: such as ``"push"``.
        usage: its arguments.
        description: shown above the flags.
    """

    def __init__(self, command: str, *, usage: str, description: str) -> None:
        """Add the flags that all commands have."""
        super().__init__(
            prog=f"autoqra {command}",
            usage=f"autoqra {command} {usage}".rstrip(),
            description=description,
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        add_common_flags(self.add_argument_group("of every command"))

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving with a page of usage.

        Raises:
            UsageError: always.
        """
        raise UsageError(message[:1].upper() + message[1:] + "." * (not message.endswith(".")))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Unknown flags get suggestions.

        Raises:
            UsageError: flags that are unknown, missing or contradict each other.
        """
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"{name!r} is unknown.{close_names(name, known) or f' `{self.prog} --help` lists the flags.'}")
        return options


def add_common_flags(group: argparse._ArgumentGroup) -> None:
    """For help and completion alone: the command line takes them out before a command sees its flags."""
    group.add_argument(
        "--json", action="store_true", help="Print one JSON document to stdout; all else goes to stderr."
    )
    group.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="Show this and leave.")
