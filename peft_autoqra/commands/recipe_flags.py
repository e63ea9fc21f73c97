"""Flags of the commands that take a recipe, by topic, for help and completion; nothing heavy is imported here.

``parser.py`` reads the same dataclasses, and TRL's ``SFTConfig``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft_autoqra.commands.command_parser import add_common_flags
from peft_autoqra.executors.arguments import ExecutorArguments
from peft_autoqra.recipe import AdapterArguments, DataArguments, EvaluationArguments, ModelArguments
from peft_autoqra.search_config import SearchArguments


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Flags of the command itself; they are not part of a recipe.

    Attributes:
        dry_run: check, and estimate what it would take; run nothing.
    """

    dry_run: bool = field(default=False, metadata={"help": "Check, and print what it would take; run nothing."})


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Flags that are explained on one page.

    Attributes:
        name: as in ``autoqra search --help NAME``.
        summary: for the list of topics.
        arguments: dataclass whose fields are the flags; None for TRL's.
        training_flags: of TRL's, those that are shown; empty for all that matter to a fine-tune.
    """

    name: str
    summary: str
    arguments: type | None
    training_flags: tuple[str, ...] = ()


MODEL = Topic(name="model", summary="the base model", arguments=ModelArguments)
DATA = Topic(name="data", summary="training and held-out data", arguments=DataArguments)
SEARCH = Topic(name="search", summary="memory budget, choices, cost and limits", arguments=SearchArguments)
WORKERS = Topic(
    name="workers", summary="who evaluates trials: this process, or a Ray cluster", arguments=ExecutorArguments
)
ADAPTER = Topic(name="adapter", summary="a plan, or the same bits and rank everywhere", arguments=AdapterArguments)
FIGURES = Topic(name="figures", summary="metrics, benchmark tasks, a baseline", arguments=EvaluationArguments)
FINE_TUNE = Topic(name="fine-tune", summary="the recipe: what matters most of TRL's SFTConfig", arguments=None)

SCORING = Topic(
    name="scoring",
    summary="how held-out data is passed: what matters here of TRL's SFTConfig",
    arguments=None,
    training_flags=(
        "per_device_eval_batch_size", "max_length", "completion_only_loss", "dataset_text_field", "bf16", "use_cpu",
        "seed",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class TrainingFlag:
    """A field of ``SFTConfig``, as ``--help`` shows it without importing TRL.

    Attributes:
        help: with its unit.
        default: TRL's; a test holds it to that.
        metavar: of its value.
    """

    help: str
    default: Any
    metavar: str


TRAINING_FLAGS: Mapping[str, TrainingFlag] = {
    "learning_rate": TrainingFlag("Highest learning rate, per optimizer step.", 2e-5, "X"),
    "lr_scheduler_type": TrainingFlag("How it falls: linear, cosine, constant, ...", "linear", "NAME"),
    "per_device_train_batch_size": TrainingFlag("Number of sequences per device and pass.", 8, "N"),
    "per_device_eval_batch_size": TrainingFlag("Number of held-out sequences per device and pass.", 8, "N"),
    "gradient_accumulation_steps": TrainingFlag("Number of passes per optimizer step.", 1, "N"),
    "num_train_epochs": TrainingFlag("Number of epochs: passes over the training data.", 3.0, "X"),
    "max_steps": TrainingFlag("Number of optimizer steps in place of epochs; -1: epochs count.", -1, "N"),
    "max_length": TrainingFlag("Tokens of a sequence at most; longer ones are cut.", 1024, "N"),
    "packing": TrainingFlag("Several sequences in one; train only.", False, "BOOL"),
    "completion_only_loss": TrainingFlag(
        "Loss on completions only; by default where the data has prompts.", None, "BOOL"
    ),
    "dataset_text_field": TrainingFlag("Column that holds the text.", "text", "NAME"),
    "gradient_checkpointing": TrainingFlag("Compute activations twice, to keep fewer.", True, "BOOL"),
    "bf16": TrainingFlag("Compute in bfloat16; by default on GPUs, off with fp16.", None, "BOOL"),
    "use_cpu": TrainingFlag("Use no GPU; by default where there is none.", False, "BOOL"),
    "optim": TrainingFlag("Optimizer: adamw_torch, adamw_torch_fused, sgd, ...", "adamw_torch_fused", "NAME"),
    "report_to": TrainingFlag("Trackers such as trackio, wandb or tensorboard.", "none", "NAME"),
    "seed": TrainingFlag("Seed of all randomness (a number without unit).", 42, "N"),
}


def recipe_parser_for_help(topics: tuple[Topic, ...], output_dir: str) -> argparse.ArgumentParser:
    """One group of flags for each topic and one for the command's own; it parses nothing.

    Args:
        topics: of the command.
        output_dir: default of that flag; empty for a command that writes nothing there.
    """
    parser = argparse.ArgumentParser(prog="autoqra", add_help=False)
    for topic in topics:
        group = parser.add_argument_group(topic.name)
        if topic.arguments is None:
            _add_training_flags(group, topic.training_flags or tuple(TRAINING_FLAGS))
        else:
            add_flags(group, topic.arguments)
    own = parser.add_argument_group("options")
    own.add_argument("--config", metavar="FILE", help="Settings in YAML; flags go before them.")
    if output_dir:
        own.add_argument("--output_dir", metavar="DIR", default=output_dir, help="Where results are written.")
    add_flags(own, CommandOptions)
    add_common_flags(own)
    return parser


def add_flags(group: argparse._ArgumentGroup, arguments: type) -> None:
    """A flag for each field of a dataclass.

    Args:
        group: to add them to.
        arguments: a dataclass whose fields' metadata has ``help``, and perhaps ``choices``, ``metavar``, ``aliases``.
    """
    hints = get_type_hints(arguments)
    for each in fields(arguments):
        settings = dict(each.metadata)
        kind, is_list = _kind(hints[each.name])
        if get_origin(kind) is Literal:
            settings["choices"] = list(get_args(kind))
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if kind is bool:
            settings |= {"action": "store_true"} if default is False else {"choices": _BOOLS, "metavar": "BOOL"}
        else:
            settings["nargs"] = "+" if is_list else None
        if "choices" not in settings and kind is not bool:
            settings.setdefault("metavar", _METAVARS.get(kind, "TEXT"))
        group.add_argument(f"--{each.name}", *settings.pop("aliases", ()), default=default, **settings)


_METAVARS: Mapping[Any, str] = {int: "N", float: "X"}
_BOOLS = ("true", "false")


def _kind(hint: Any) -> tuple[Any, bool]:
    """Type of a value, and whether there may be several."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return hint, False


def _add_training_flags(group: argparse._ArgumentGroup, names: tuple[str, ...]) -> None:
    for name in names:
        flag = TRAINING_FLAGS[name]
        group.add_argument(f"--{name}", metavar=flag.metavar, default=flag.default, help=flag.help)
