"""Recipes and flags: YAML first, then the command line, with TRL's parser and field names.

Their help is in ``help_pages.py``, which does not import TRL.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import SFTConfig, TrlParser

from peft_autoqra.commands.command_parser import HelpFormatter, close_names
from peft_autoqra.commands.recipe_flags import CommandOptions
from peft_autoqra.commands.registry import COMMANDS
from peft_autoqra.errors import UsageError
from peft_autoqra.executors.arguments import ExecutorArguments
from peft_autoqra.recipe import AdapterArguments, DataArguments, EvaluationArguments, ModelArguments, RecipeError
from peft_autoqra.replaced_file import replaced_file
from peft_autoqra.search_config import SearchArguments

RECIPE_FILE = "recipe.yaml"
RECIPE_TYPES = (
    *(ModelArguments, DataArguments, SearchArguments, ExecutorArguments, AdapterArguments, EvaluationArguments),
    SFTConfig,
)
"""One recipe serves all commands; each takes its own settings from it."""

_SECRET_FIELDS = ("hub_token", "push_to_hub_token")


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
        with replaced_file(directory / RECIPE_FILE) as partial:
            partial.write_text(text, encoding="utf-8")


class RecipeParser(TrlParser):  # type: ignore[misc]
    """TrlParser with one-line errors and recipes that several commands share.

    The settings are one object for each topic of the command, in their order, and :class:`CommandOptions`.

    Args:
        name: of a command with topics, such as ``"search"``.
    """

    def __init__(self, name: str) -> None:
        """Add the flags."""
        command = COMMANDS[name]
        super().__init__(
            [*(topic.arguments or SFTConfig for topic in command.topics), CommandOptions],
            prog=f"autoqra {name}",
            usage=f"autoqra {name} {command.usage}",
            description=command.description,
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="FILE", help="Settings in YAML; flags go before them.")
        self.set_defaults(output_dir=command.output_dir or None)
        self._own_defaults = vars(self.parse_known_args([])[0])
        self._of_other_commands: dict[str, Any] = {}
        self._positional = command.positional

    def parse(self, argv: Sequence[str]) -> ParsedRecipe:
        """Read recipe and flags.

        Raises:
            UsageError: a mistake in them.
        """
        try:
            namespace = self._parse_namespace(argv)
            given = self._given(namespace)
            namespace.use_cpu = namespace.use_cpu or _must_use_cpu(namespace.bf16)
            settings = tuple(self._make(dataclass_type, namespace) for dataclass_type in self.dataclass_types)
        except (OSError, TypeError, ValueError) as error:
            self.error(str(error))
        return ParsedRecipe(settings, given)

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving with a page of usage.

        Raises:
            UsageError: always.
        """
        raise UsageError(message)

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
        if prefix and not name.startswith("-") and self._positional:
            return f"{name!r} is no flag; {self._positional} comes right after `{self.prog}`."
        known = [prefix + action.dest for action in self._actions]
        hint = close_names(name, known) or f" `{self.prog} --help all` lists what there is."
        return f"{name!r} is unknown.{hint}"

    @staticmethod
    def _make(dataclass_type: Callable[..., Any], namespace: argparse.Namespace) -> Any:
        names = [f.name for f in fields(dataclass_type) if f.init]  # type: ignore[arg-type]
        return dataclass_type(**{name: getattr(namespace, name) for name in names})

    def _given(self, namespace: argparse.Namespace) -> dict[str, Any]:
        left_out = {"config", *_SECRET_FIELDS, *(f.name for f in fields(CommandOptions))}
        own = {
            name: value
            for name, value in vars(namespace).items()
            if name not in left_out and value != self._own_defaults[name]
        }
        return own | self._of_other_commands


def _must_use_cpu(bf16: bool | None) -> bool:
    """Apple's MPS lacks float64; without a GPU SFTConfig's default is bf16, and processes train alone, unless told.

    Whoever asks for bf16 there is told by transformers that there is no GPU.
    """
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type == "mps"  # type: ignore[union-attr]
    return not bf16


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
