"""Which linear layers of a model a plan may decide on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from peft_autoqra.errors import InvalidPlanError


def linear_targets(model: nn.Module, target_modules: str | Iterable[str] = "all-linear") -> dict[str, nn.Linear]:
    """Module name to unquantized linear layer, by PEFT's own matching.

    Args:
        model: the base model.
        target_modules: as in ``LoraConfig``: ``"all-linear"`` (without the output layer), a regular expression, or
            names and suffixes.

    Raises:
        InvalidPlanError: nothing matches, or a match is not a plain ``nn.Linear`` with a weight of its own.
    """
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules=wanted), model)
    targets: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        found = check_target_module_exists(config, name)
        if not found or isinstance(found, _ExcludedModule):
            continue
        if type(module) is not nn.Linear:
            raise InvalidPlanError(
                f"{name!r} is a {type(module).__name__}; only plain nn.Linear layers can be planned. Narrow "
                "target_modules, or load the model without quantization or adapters."
            )
        targets[name] = module
    if not targets and getattr(model, "is_quantized", False):
        raise InvalidPlanError(
            "The model is quantized already, so there is nothing left to plan. Give the unquantized model; to train a "
            "quantized base, call get_peft_model on it in Python."
        )
    if not targets:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise InvalidPlanError(f"target_modules={target_modules!r} matches no linear layer; there are {names[-4:]}.")
    check_untied(model, targets)
    return targets


def check_untied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that share their weight with another module, as a tied output layer does with the embedding.

    Args:
        model: where sharing is looked for.
        layers: module name to a layer of the model that has a ``weight``.

    Raises:
        InvalidPlanError: a weight is shared.
    """
    owners = defaultdict(list)
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(parameter_name)
    for name, layer in layers.items():
        sharing = owners[id(layer.weight)]
        if len(sharing) > 1:
            raise InvalidPlanError(
                f"{name!r} cannot be quantized by itself: its weight is tied, {sharing} are one tensor. Leave it out "
                "of the plan or target_modules, or untie it (tie_word_embeddings=False)."
            )
