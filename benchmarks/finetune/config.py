"""Configurations: which methods on which tasks at which budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks.finetune.setting import Recipe, Setting
from benchmarks.finetune.tasks import SplitSizes


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the entry."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Methods that are run together; groups are run in order.

    Attributes:
        methods: names in :mod:`benchmarks.finetune.methods.registry`.
        budgets: for those methods that fit themselves into one.
        tasks: None for all of the configuration.
        seeds: of training; the first one decides the learning rate.
    """

    methods: tuple[str, ...]
    budgets: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One file of ``benchmarks/finetune/configs``.

    Attributes:
        name: of the file.
        model: hub id or folder; ``"SmolLM2-135M-Instruct"`` comes from a package registry.
        tasks: names.
        sizes: examples of each split.
        recipe: of every fine-tune.
        learning_rates: tried for every method, the same number for all.
        groups: what is run.
        decoded: train with quantized weights decoded once, for CPUs; no result changes by it.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    sizes: SplitSizes
    recipe: Recipe
    learning_rates: tuple[float, ...]
    groups: tuple[Group, ...]
    decoded: bool = False

    def setting(self, task: str, model_id: str, cache_dir: Path) -> Setting:
        """Of one task.

        Args:
            task: name.
            model_id: folder or hub id of :attr:`model`.
            cache_dir: for plans and calibrations.
        """
        return Setting(model_id=model_id, task_name=task, sizes=self.sizes, recipe=self.recipe, cache_dir=cache_dir)


def read_config(path: Path) -> Config:
    """Read a YAML file.

    Raises:
        ConfigError: it is not there, or an entry is missing or unknown.
    """
    if not path.is_file():
        raise ConfigError(f"There is no configuration {path}.")
    content = yaml.safe_load(path.read_text("utf-8"))
    _check_keys(path, content, Config, without=("name",))
    _check_keys(path, content["sizes"], SplitSizes)
    rates = tuple(float(rate) for rate in content["learning_rates"])
    if not rates or not content["groups"]:
        raise ConfigError(f"{path} needs at least one of learning_rates and of groups.")
    recipe = {"learning_rate": sorted(rates)[len(rates) // 2], **content["recipe"]}
    _check_keys(path, recipe, Recipe)
    for group in content["groups"]:
        _check_keys(path, group, Group)
    return Config(
        name=path.stem,
        model=content["model"],
        tasks=tuple(content["tasks"]),
        sizes=SplitSizes(**content["sizes"]),
        recipe=Recipe(**recipe),
        learning_rates=rates,
        groups=tuple(
            Group(**{key: tuple(value) if isinstance(value, list) else value for key, value in group.items()})
            for group in content["groups"]
        ),
        decoded=bool(content.get("decoded", False)),
    )


def _check_keys(path: Path, content: Mapping[str, Any], kind: type, without: tuple[str, ...] = ()) -> None:
    known = {field.name: field for field in fields(kind) if field.name not in without}
    if unknown := sorted(content.keys() - known.keys()):
        raise ConfigError(f"{path} has unknown entries {unknown}; it may have {sorted(known)}.")
    needed = {name for name, field in known.items() if field.default is MISSING}
    if missing := sorted(needed - content.keys()):
        raise ConfigError(f"{path} lacks the entries {missing}.")
