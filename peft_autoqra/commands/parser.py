"""Recipes and flags: YAML first, then the command line, with TRL's parser and field names."""

from __future__ import annotations

import argparse
import copy
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import SFTConfig, TrlParser

from peft_autoqra.recipe import AdapterArguments, DataArguments, EvaluationArguments, ModelArguments, RecipeError
from peft_autoqra.search_config import SearchArguments

RECIPE_FILE = "recipe.yaml"
RECIPE_TYPES = (ModelArguments, DataArguments, SearchArguments, AdapterArguments, EvaluationArguments, SFTConfig)
"""One recipe serves all commands; each takes its own settings from it."""

_COMMON_TRAINING_FIELDS = (
    "output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "max_length", "packing", "completion_only_loss", "dataset_text_field", "gradient_checkpointing",
    "bf16", "optim", "seed",
)  # fmt: skip
_SECRET_FIELDS = ("hub_token", "push_to_hub_token")


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Flags of the command itself; they are not part of a recipe.

    Attributes:
        dry_run: estimate memory and time, train nothing.
    """

    dry_run: bool = field(default=False, metadata={"help": "Print memory and time estimates; train nothing."})


@dataclass(frozen=True)
class ParsedRecipe:
    """The settings of one command.

    Attributes:
        settings: one object for each of the dataclasses asked for, in that order.
        given: the settings that differ from the defaults, other commands' included, without secrets.
    """

    settings: tuple[Any, ...]
    given: dict[str, Any]

    def save(self, directory: Path) -> None:
        """Write what was given as ``recipe.yaml``, so that the same run can be started from it."""
        directory.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.given, sort_keys=False, allow_unicode=True)
        (directory / RECIPE_FILE).write_text(text, encoding="utf-8")


class RecipeParser(TrlParser):  # type: ignore[misc]
    """TrlParser with short help, one-line errors and recipes that several commands share.

    Args:
        command: such as ``"search"``.
        dataclass_types: what the command takes beside :class:`CommandOptions`.
        description: shown above the flags.
        output_dir: default of the recipe's ``output_dir``.
    """

    def __init__(self, command: str, dataclass_types: Sequence[type], *, description: str, output_dir: str) -> None:
        """Add the flags."""
        super().__init__(
            [*dataclass_types, CommandOptions],
            prog=f"autoqra {command}",
            usage=f"autoqra {command} [--config RECIPE.yaml] [--FIELD VALUE ...]",
            description=description,
            epilog="Every field of TRL's SFTConfig is a flag too; --help_all lists them.",
            formatter_class=_HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="RECIPE.yaml", help="Settings in YAML; flags go before them.")
        self.add_argument("-h", "--help", action=_Help, help="Show this and leave.")
        self.add_argument("--help_all", action=_Help, help="Show the flags of SFTConfig too.")
        self.set_defaults(output_dir=output_dir)
        self._own_defaults = vars(self.parse_known_args([])[0])
        self._of_other_commands: dict[str, Any] = {}

    def parse(self, argv: Sequence[str]) -> ParsedRecipe:
        """Read recipe and flags; exits with status 2 and one line on a mistake."""
        try:
            namespace = self._parse_namespace(argv)
            given = self._given(namespace)
            namespace.use_cpu = namespace.use_cpu or _must_use_cpu(namespace.bf16)
            settings = tuple(self._make(dataclass_type, namespace) for dataclass_type in self.dataclass_types)
        except (OSError, TypeError, ValueError) as error:
            self.error(str(error))
        return ParsedRecipe(settings, given)

    def error(self, message: str) -> NoReturn:
        """One line instead of a page of usage."""
        print(f"{self.prog}: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(2)

    def _parse_namespace(self, argv: Sequence[str]) -> argparse.Namespace:
        arguments = [part for argument in argv for part in _split_config(argument)]
        if arguments.count("--config") > 1:
            raise RecipeError("--config may be given once.")
        if "--config" in arguments:
            position = arguments.index("--config")
            if position + 1 == len(arguments):
                raise RecipeError("--config needs a file.")
            self._apply_recipe(_read_recipe(Path(arguments[position + 1])))
        namespace = argparse.Namespace()
        _, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            raise RecipeError(self._unknown(unknown[0].split("=")[0], "--"))
        return namespace

    def _apply_recipe(self, recipe: dict[str, Any]) -> None:
        env = recipe.pop("env", None) or {}
        if not isinstance(env, dict):
            raise RecipeError(f"env={env!r} must be a mapping such as `env: {{CUDA_VISIBLE_DEVICES: 0}}`.")
        os.environ.update({key: str(value) for key, value in env.items()})
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        for key, value in recipe.items():
            if key in lists and value is not None and not isinstance(value, list):
                recipe[key] = [value]
        shared = {f.name for dataclass_type in RECIPE_TYPES for f in fields(dataclass_type)}
        for flag in self.set_defaults_with_config(**recipe)[::2]:
            key = flag.removeprefix("--")
            if key not in shared:
                raise RecipeError(self._unknown(key, ""))
            self._of_other_commands[key] = recipe[key]

    def _unknown(self, name: str, prefix: str) -> str:
        known = [prefix + action.dest for action in self._actions]
        close = difflib.get_close_matches(name, known, n=2)
        hint = f" Did you mean {' or '.join(close)}?" if close else " --help_all lists what there is."
        return f"{name!r} is unknown.{hint}"

    @staticmethod
    def _make(dataclass_type: Callable[..., Any], namespace: argparse.Namespace) -> Any:
        names = [f.name for f in fields(dataclass_type) if f.init]  # type: ignore[arg-type]
        return dataclass_type(**{name: getattr(namespace, name) for name in names})

    def _given(self, namespace: argparse.Namespace) -> dict[str, Any]:
        left_out = {"config", "help", "help_all", *_SECRET_FIELDS, *(f.name for f in fields(CommandOptions))}
        own = {
            name: value
            for name, value in vars(namespace).items()
            if name not in left_out and value != self._own_defaults[name]
        }
        return own | self._of_other_commands


class _HelpFormatter(argparse.HelpFormatter):
    """Defaults where there are any, and one spelling of each flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return ", ".join(flags or action.option_strings)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, False, [], argparse.SUPPRESS)
        text = action.help or ""
        if not has_default:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{text} [{str(getattr(default, 'value', default)).replace('%', '%%')}]"


class _Help(argparse.Action):
    """Prints the flags by topic, without the rarely used ones unless all are asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        show_all = self.dest == "help_all"
        formatter = parser._get_formatter()
        formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
        formatter.add_text(parser.description)
        shown: set[str] = set()
        for title, names in _topics(parser, show_all=show_all):
            actions = [a for a in parser._actions if a.dest in names - shown and not _is_negation(a)]
            formatter.start_section(title)
            formatter.add_arguments(actions if show_all else [_first_sentence(action) for action in actions])
            formatter.end_section()
            shown |= names
        formatter.add_text(None if show_all else parser.epilog)
        print(formatter.format_help(), end="")  # noqa: T201
        parser.exit()


def _is_negation(action: argparse.Action) -> bool:
    return action.option_strings[0].startswith("--no_")


def _first_sentence(action: argparse.Action) -> argparse.Action:
    short = copy.copy(action)
    short.help = (action.help or "").split(". ")[0].rstrip(".") + "."
    return short


def _topics(parser: Any, *, show_all: bool) -> list[tuple[str, set[str]]]:
    titles = {
        ModelArguments: "model",
        DataArguments: "data",
        SearchArguments: "search",
        AdapterArguments: "bits and ranks",
        EvaluationArguments: "evaluation",
        SFTConfig: "fine-tune (TRL's SFTConfig)",
    }
    topics = [("options", {"config", "help", "help_all", *(f.name for f in fields(CommandOptions))})]
    for dataclass_type in parser.dataclass_types:
        if dataclass_type in titles:
            names = {f.name for f in fields(dataclass_type)}
            if dataclass_type is SFTConfig and not show_all:
                names &= set(_COMMON_TRAINING_FIELDS)
            topics.append((titles[dataclass_type], names))
    return topics


def _must_use_cpu(bf16: bool | None) -> bool:
    """Apple's MPS lacks float64; and without a GPU SFTConfig wants to be told before it takes its default, bf16."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type == "mps"  # type: ignore[union-attr]
    return bf16 is None


def _split_config(argument: str) -> list[str]:
    """``--config=FILE`` in two parts."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must hold a mapping such as `learning_rate: 1.0e-3`.")
    return recipe
