"""Which layers of a model a configuration quantizes or adapts."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_autoqra.dense_layers import DENSE_LAYERS, dense_shape, dense_weight, is_dense_layer
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan
from peft_autoqra.plan_calibration import ModuleCalibration
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, layer_bits
from peft_autoqra.target_modules import is_all_linear
from peft_autoqra.tuner.config import AutoQRAConfig, exact_pattern
from peft_autoqra.tuner.layer import QuantLoRALinear
from peft_autoqra.tuner.patterns import inexact


@dataclass(frozen=True)
class Target:
    """A base layer and what it shall become."""

    name: str
    layer: nn.Module
    wanted: LayerPlan

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        if isinstance(self.layer, QUANTIZED_LAYERS):
            return self.layer.out_features, self.layer.in_features
        return dense_shape(self.layer)

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``; dense layers only."""
        return dense_weight(self.layer)


def include_all_linear_layers(config: LoraConfig, model: nn.Module) -> None:
    """Expand ``target_modules="all-linear"`` as PEFT does, and to the quantized layers, which PEFT does not know."""
    if is_all_linear(config.target_modules):
        expanded = copy.copy(config)
        if isinstance(config, AutoQRAConfig):
            expanded.task_type = "SEQ_CLS"  # leaves out classification heads, too
        config.target_modules = _maybe_include_all_linear_layers(expanded, model).target_modules
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        layers = base_layers(model).items()
        config.target_modules |= {n for n, m in layers if isinstance(m, QUANTIZED_LAYERS) and m is not head}


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module name to module, with tuner layers seen through and their inner parts left out."""
    layers: dict[str, nn.Module] = {}
    inside = "\0"  # the tuner layer that was met last; its parts follow it at once
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
            module = module.unmerged_layer if isinstance(module, QuantLoRALinear) else module.get_base_layer()
        layers[name] = module
    return layers


def find_targets(model: nn.Module, config: AutoQRAConfig) -> list[Target]:
    """Every module that the configuration quantizes, adapts or names; its names and patterns all match something.

    Raises:
        PlanMismatchError: the plan names modules that the model does not have.
        InvalidPlanError: a name or pattern matches nothing.
    """
    layers = base_layers(model)
    if config.plan is not None:
        _check_names(config.plan, layers)
    targets = []
    matched = set()
    bits_keys, rank_keys = (matching_keys(patterns, layers) for patterns in (config.bits_pattern, config.rank_pattern))
    for name, layer in layers.items():
        bits_key, rank_key = bits_keys.get(name), rank_keys.get(name)
        found = check_target_module_exists(config, name)
        adapted = bool(found) and not isinstance(found, _ExcludedModule)
        named = config.plan is not None and name in config.plan
        quantized = isinstance(layer, QUANTIZED_LAYERS)  # by an earlier adapter; a reload has to do it as well
        matched.add(bits_key)
        if adapted:
            matched.add(rank_key)
        if adapted or named or quantized or (bits_key is not None and isinstance(layer, DENSE_LAYERS)):
            default_bits = layer_bits(layer) if quantized and not adapted else config.bits
            bits = default_bits if bits_key is None else config.bits_pattern[bits_key]
            rank = config.r if rank_key is None else config.rank_pattern[rank_key]
            targets.append(Target(name, layer, LayerPlan(bits, rank if adapted else 0)))
    _check_matches(targets, matched, layers, config)
    return targets


def matching_keys(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name to the key that decides it: its exact pattern, else the first that matches, as in PEFT.

    A plan has an exact pattern for each module; trying all on all would take minutes on a large model.

    Args:
        patterns: of a configuration.
        names: of modules; those that no key matches are left out of the result.
    """
    others = inexact(patterns)
    exact = {name: exact_pattern(name) for name in names}
    keys = {name: key if key in patterns else get_pattern_key(others, name) for name, key in exact.items()}
    return {name: key for name, key in keys.items() if key in patterns}


def _check_matches(
    targets: list[Target], matched: set[str | None], layers: Mapping[str, nn.Module], config: AutoQRAConfig
) -> None:
    """Every name and pattern has to match something."""
    wanted = config.target_modules
    found = suffixes(layers)
    absent = [suffix for suffix in wanted if suffix not in found] if not isinstance(wanted, str) else []
    if absent or not (config.target_parameters or any(target.wanted.rank for target in targets)):
        raise InvalidPlanError(f"target_modules {absent or wanted} match no module; {_examples(layers)}")
    matched = matched | parameter_rank_patterns(layers, config).keys()
    for field in ("bits_pattern", "rank_pattern"):
        unmatched = sorted(set(getattr(config, field)) - matched)
        if unmatched:
            raise InvalidPlanError(
                f"{field} keys {unmatched[:3]} match no module, or none that an earlier key does not match already; "
                f"{_examples(layers)}"
            )


def parameter_rank_patterns(layers: Mapping[str, nn.Module], config: AutoQRAConfig) -> dict[str, int]:
    """The entries of ``rank_pattern`` that decide over ``target_parameters`` and not over modules."""
    keys = set(matching_keys(config.rank_pattern, targeted_parameters(layers, config)).values())
    return {key: rank for key, rank in config.rank_pattern.items() if key in keys}


def targeted_parameters(layers: Mapping[str, nn.Module], config: AutoQRAConfig) -> list[str]:
    """Full names of what ``target_parameters`` names."""
    wanted = set(config.target_parameters or ())
    if not wanted:
        return []
    names = [f"{name}.{own}" for name, layer in layers.items() for own, _ in layer.named_parameters(recurse=False)]
    return [name for name in names if not wanted.isdisjoint(suffixes([name]))]


def suffixes(names: Iterable[str]) -> set[str]:
    """Everything that ends a name: the whole and what follows each dot."""
    return {
        suffix for name in names for suffix in accumulate(reversed(name.split(".")), lambda end, part: f"{part}.{end}")
    }


def _examples(layers: Mapping[str, nn.Module]) -> str:
    names = [name for name, layer in layers.items() if isinstance(layer, (*DENSE_LAYERS, *QUANTIZED_LAYERS))]
    return f"linear layers have names such as {names[:3]}."


def _check_names(plan: BitRankPlan, layers: Mapping[str, nn.Module]) -> None:
    missing = [name for name in plan if name not in layers]
    if missing:
        close = difflib.get_close_matches(missing[0], layers, n=3, cutoff=0.5)
        raise PlanMismatchError(
            f"The plan names {len(missing)} modules that the model does not have, such as {missing[0]!r}"
            + (f"; close names of the model: {close}. " if close else ". ")
            + "Was the plan made for another model?"
        )


def module_calibration(target: Target, config: AutoQRAConfig) -> ModuleCalibration | None:
    """What calibration found of a layer; None without."""
    return config.calibration.module(target.name) if config.calibration else None


def to_quantize(targets: Iterable[Target]) -> list[Target]:
    """Lists no layer that is quantized already or stays dense."""
    return [t for t in targets if is_dense_layer(t.layer) and t.wanted.bits != DENSE_BITS]
