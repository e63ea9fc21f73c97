"""Which linear layers of a model a plan may decide on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from torch.nn.modules.conv import _ConvNd

from peft_autoqra.dense_layers import DENSE_LAYERS, DenseLayer, is_dense_layer
from peft_autoqra.errors import InvalidPlanError


def linear_targets(model: nn.Module, target_modules: str | Iterable[str] = "all-linear") -> dict[str, DenseLayer]:
    """Module name to unquantized linear layer, by PEFT's own matching.

    Args:
        model: the base model.
        target_modules: as in ``LoraConfig``: ``"all-linear"`` (without the output layer), a regular expression, or
            names and suffixes.

    Raises:
        InvalidPlanError: nothing matches; a match is not a plain ``nn.Linear`` or ``Conv1D`` with a weight of its
            own; or ``"all-linear"`` would leave out the fused experts of a mixture.
    """
    if is_all_linear(target_modules):
        check_no_fused_experts(model)
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(target_modules=wanted, task_type="SEQ_CLS")  # leaves out classification heads, too
    config = _maybe_include_all_linear_layers(config, model)
    targets: dict[str, DenseLayer] = {}
    for name, module in model.named_modules():
        found = check_target_module_exists(config, name)
        if not found or isinstance(found, _ExcludedModule):
            continue
        if not is_dense_layer(module):
            raise InvalidPlanError(
                f"{name!r} is a {type(module).__name__}; only plain nn.Linear and Conv1D layers can be planned. "
                "Narrow target_modules, or load the model without quantization or adapters."
            )
        targets[name] = module
    if not targets and getattr(model, "is_quantized", False):
        raise InvalidPlanError(
            "The model is quantized already, so there is nothing left to plan. Give the unquantized model; to train a "
            "quantized base, call get_peft_model on it in Python."
        )
    if not targets:
        names = [name for name, module in model.named_modules() if isinstance(module, DENSE_LAYERS)]
        raise InvalidPlanError(f"target_modules={target_modules!r} matches no linear layer; there are {names[-4:]}.")
    check_untied(model, targets)
    return targets


def is_all_linear(target_modules: object) -> bool:
    """Whether it is PEFT's shorthand, which may be written in any case."""
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


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


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name to the weights that a mixture of experts keeps in one tensor, ``[num_experts, rows, columns]``.

    transformers does so since version 5; no linear layer holds them.
    """
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd)
    }


def share_of_weights(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> float:
    """Fraction of a model's parameters that are these."""
    return sum(p.numel() for p in parameters.values()) / sum(p.numel() for p in model.parameters())


def check_no_fused_experts(model: nn.Module) -> None:
    """Refuse ``"all-linear"`` where most weights would be left out without a word.

    Raises:
        InvalidPlanError: the model has fused experts.
    """
    experts = fused_experts(model)
    if experts:
        raise InvalidPlanError(
            f"The model keeps its experts in fused parameters such as {next(iter(experts))!r}, "
            f"{share_of_weights(experts, model):.0%} of its weights, which would stay at 16 bits. "
            "Where that is meant, name the linear layers to quantize in target_modules or a plan."
        )
