"""Quantizing one weight after another as they arrive from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_autoqra.dense_layers import DENSE_LAYERS, DenseLayer, dense_shape, dense_weight, is_dense_layer
from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.fingerprint import fingerprint_samples, sample_weight
from peft_autoqra.plan import DENSE_BITS
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, layer_bits, make_backend, quantize_layer
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.streaming.quant_config import AutoQRAQuantConfig, QuantizedModule
from peft_autoqra.streaming.released_memory import ReleasedMemory
from peft_autoqra.tuner.preparation import check_fingerprint, check_finite
from peft_autoqra.tuner.target_checks import resolve_targets
from peft_autoqra.tuner.targets import Target, module_calibration


class NotStreamedError(InvalidPlanError):
    """A model that can be quantized only after it was loaded."""


class WeightStream:
    """Puts quantized layers in the place of a model's linear layers, weight by weight.

    Args:
        model: on the meta device, before any weight is read.
        config: what to quantize.
        checkpoint_files: that the weights are read from.

    Raises:
        PlanMismatchError: module names or shapes are not those the plan was made for.
        InvalidPlanError: a layer cannot be quantized as asked.
    """

    def __init__(self, model: nn.Module, config: AutoQRAQuantConfig, checkpoint_files: Iterable[str | Path]) -> None:
        """Check the whole plan."""
        self._config = config
        self._adapter_config = config.to_adapter_config()
        self._backend = make_backend(self._adapter_config.quantizer)
        self._targets = {target.name: target for target in resolve_targets(model, self._adapter_config)}
        _check_not_tied(model, [name for name in self._targets if self.wants(name)])
        self._samples: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self._memory = ReleasedMemory(checkpoint_files)

    def wants(self, module_name: str) -> bool:
        """Whether the weight of this module is to be quantized."""
        return module_name in self._targets and self._targets[module_name].wanted.bits != DENSE_BITS

    def quantized_bytes(self, module_name: str) -> int:
        """Bytes of codes and metadata that the module will take."""
        target = self._targets[module_name]
        return sum(self._backend.num_bytes(*target.shape, target.wanted.bits, module_name))

    def quantize(self, model: nn.Module, module_name: str, weight: Tensor) -> None:
        """Quantize a weight and swap its layer.

        Args:
            model: that is being loaded.
            module_name: one that :meth:`wants` is true for.
            weight: as the checkpoint holds it, on its device and in its dtype.

        Raises:
            InvalidPlanError: the weight holds values that are not finite.
            PlanMismatchError: its shape is not the layer's.
        """
        target = self._targets[module_name]
        dense = _dense(model.get_submodule(module_name), weight)  # its bias may have been read already
        _check_weight(target, dense)
        self._samples[module_name] = (target.shape, sample_weight(dense_weight(dense)))
        calibration = module_calibration(target, self._adapter_config)
        quantized = quantize_layer(self._backend, dense, target.wanted.bits, calibration, module_name)
        _mark_initialized(quantized)
        model.set_submodule(module_name, quantized)
        self._memory.note_read(weight.numel() * weight.element_size())

    def finish(self, model: nn.Module) -> AutoQRAQuantConfig:
        """Check that nothing was left out.

        Returns:
            The configuration of the loaded model, with what each module became.

        Raises:
            NotStreamedError: the checkpoint held no weight of a module.
            PlanMismatchError: the weights are not those that the plan was made for.
        """
        self._memory.release()
        modules = {}
        for name, target in self._targets.items():
            layer = model.get_submodule(name)
            if layer_bits(layer) != target.wanted.bits or not _is_read(layer):
                raise NotStreamedError(
                    f"The checkpoint holds no weight or bias for {name!r}, or one that transformers puts together "
                    "in a way that AutoQRA cannot quantize while loading. Leave the module out of the plan or "
                    "target_modules, or load the model without quantization_config and quantize it with "
                    "get_peft_model(model, AutoQRAConfig(...))."
                )
            if isinstance(layer, (*DENSE_LAYERS, *QUANTIZED_LAYERS)):
                modules[name] = describe_layer(layer)
        fingerprint = self._fingerprint(model)
        check_fingerprint(fingerprint, self._adapter_config)
        return self._config.loaded(modules, fingerprint)

    def _fingerprint(self, model: nn.Module) -> str | None:
        """That of all targets, as quantizing in place takes it; None where there are others than linear layers."""
        for name in self._targets.keys() - self._samples.keys():
            layer = model.get_submodule(name)
            if not is_dense_layer(layer):
                return self._adapter_config.base_fingerprint
            self._samples[name] = (dense_shape(layer), sample_weight(dense_weight(layer)))
        return fingerprint_samples((name, shape, sample) for name, (shape, sample) in self._samples.items())


def _mark_initialized(layer: nn.Module) -> None:
    """Keep transformers from initializing a quantized layer; its bias is marked when it is read."""
    own: list[Any] = [parameter for name, parameter in layer.named_parameters(recurse=False) if name != "bias"]
    for part in (*own, layer):
        part._is_hf_initialized = True


def describe_layer(layer: Any) -> QuantizedModule:
    """What config.json notes about a linear layer, quantized or not."""
    if is_dense_layer(layer):
        return QuantizedModule(bits=DENSE_BITS, shape=dense_shape(layer))
    shape = (layer.out_features, layer.in_features)
    if not isinstance(layer, QuantLinear):
        return QuantizedModule(bits=layer.bits, shape=shape)
    return QuantizedModule(
        bits=layer.bits,
        shape=shape,
        group_size=layer.weight_format.group_size,
        calibration_digest=layer.calibration_digest,
    )


def _dense(layer: DenseLayer, weight: Tensor) -> DenseLayer:
    """A layer of its own, so that nothing keeps the dense weight once it is quantized."""
    dense = copy.copy(layer)
    dense._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": layer.bias}
    return dense


def _is_read(layer: nn.Module) -> bool:
    """Whether all parameters come from the checkpoint; transformers marks these."""
    parameters = [p for name, p in layer.named_parameters(recurse=False) if name in ("weight", "W_q", "bias")]
    return all(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters)


def _check_weight(target: Target, read: DenseLayer) -> None:
    shape = tuple(dense_weight(read).shape)
    if shape != target.shape:
        raise PlanMismatchError(
            f"The checkpoint's weight of {target.name!r} has shape {shape}, the model wants {target.shape}. Load the "
            "checkpoint with its own config.json, and without tensor parallelism."
        )
    check_finite(target.name, read.weight)


def _check_not_tied(model: nn.Module, module_names: Iterable[str]) -> None:
    """Weights are tied after loading only, so that sharing does not show yet."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in module_names:
        if f"{name}.weight" in {*tied.keys(), *tied.values()}:
            raise InvalidPlanError(
                f"{name!r} cannot be quantized by itself: its weight is tied to another module's. Leave it out of the "
                "plan or target_modules, or untie it (tie_word_embeddings=False)."
            )
