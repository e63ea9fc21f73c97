"""The quantizer that transformers calls while it loads and saves a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from peft_autoqra.errors import AutoQRAError, InvalidPlanError
from peft_autoqra.plan import BitRankPlan, QuantizerSettings
from peft_autoqra.quant.backends import QUANTIZED_LAYERS, dense_layer
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.streaming.base_card import BASE_TAGS, base_metadata
from peft_autoqra.streaming.checkpoint_codes import check_code_entries, check_filled
from peft_autoqra.streaming.empty_layers import fitting_names, put_empty_layers
from peft_autoqra.streaming.quant_config import METHOD, AutoQRAQuantConfig
from peft_autoqra.streaming.weight_stream import WeightStream, describe_layer
from peft_autoqra.tuner.model import QuantLoRAModel


def register() -> None:
    """Make transformers know the method; calling it again changes nothing."""
    QuantLoRAModel.note_base = staticmethod(note_base)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(AutoQRAQuantConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(AutoQRAHfQuantizer)


def note_base(model: nn.Module, plan: BitRankPlan | None) -> None:
    """Record on a model that was quantized in place how, so that it is saved and loaded as a streamed one is.

    Args:
        model: without adapters.
        plan: names the layers that were planned, quantized or not, and knows their fingerprint.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QUANTIZED_LAYERS)}
    noted = getattr(model, "hf_quantizer", None) is not None
    if not layers or noted or not isinstance(model, PreTrainedModel):
        return
    if plan is not None:
        layers |= {name: model.get_submodule(name) for name in plan.shapes}
    quantizer = plan.quantizer if plan is not None else QuantizerSettings()
    config = AutoQRAQuantConfig(
        quant_backend=quantizer.backend,
        group_size=quantizer.group_size,
        base_fingerprint=plan.base_model.fingerprint if plan is not None else None,
        modules={name: describe_layer(layer) for name, layer in layers.items()},
    )
    _note_config(model, config)


def empty_base(model: PreTrainedModel, config: AutoQRAQuantConfig) -> None:
    """Make a model on the meta device one that was quantized, without values.

    Args:
        model: unquantized.
        config: of the quantized model, which another process has.

    Raises:
        PlanMismatchError: the model has no such layers.
    """
    put_empty_layers(model, config.modules)
    _note_config(model, config)


def _note_config(model: PreTrainedModel, config: AutoQRAQuantConfig) -> None:
    model.hf_quantizer = AutoQRAHfQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.add_model_tags(list(BASE_TAGS))


class AutoQRAHfQuantizer(HfQuantizer):
    """Quantizes a 16-bit checkpoint weight by weight, or puts the codes of a quantized one in their places.

    Args:
        quantization_config: stays as it is; the model gets one of its own that says what was done.
        kwargs: transformers' ``pre_quantized``: whether the checkpoint is quantized already.
    """

    quantization_config: AutoQRAQuantConfig

    def __init__(self, quantization_config: AutoQRAQuantConfig, **kwargs: Any) -> None:
        """Nothing is read yet."""
        super().__init__(quantization_config, **kwargs)
        self._stream: WeightStream | None = None
        self._failure: AutoQRAError | None = None

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True

    def is_serializable(self) -> bool:
        """It can be saved; what cannot is refused with its reason by :meth:`get_state_dict_and_metadata`."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what needs no look at the model.

        Raises:
            InvalidPlanError: configuration and checkpoint do not go together, or weights shall stay on the disk.
        """
        if self.pre_quantized and not self.quantization_config.modules:
            raise InvalidPlanError(
                "The checkpoint's config.json has quant_method 'autoqra' but lists no modules; save it again with "
                "model.save_pretrained(...)."
            )
        if not self.pre_quantized and self.quantization_config.modules:
            raise InvalidPlanError(
                "This AutoQRAQuantConfig describes a model that is quantized already, and the checkpoint is not; give "
                "AutoQRAQuantConfig(plan=...) or AutoQRAQuantConfig(bits=...)."
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InvalidPlanError("device_map puts modules on 'disk', which AutoQRA does not support; use 'cpu'.")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if self.pre_quantized:
            config = self.quantization_config
            self.quantization_config = config.loaded(fitting_names(model, config.modules), config.base_fingerprint)
            put_empty_layers(model, self.quantization_config.modules)
            check_code_entries(model, self.quantization_config.quantized_modules, checkpoint_files or ())
        else:
            self._stream = WeightStream(model, self.quantization_config, checkpoint_files or ())

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether the parameter is the weight of a layer to quantize."""
        module_name, kind = param_name.rpartition(".")[::2]
        return self._stream is not None and kind == "weight" and self._stream.wants(module_name)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per weight once quantized, from which transformers makes its device map."""
        if self._stream is None or not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        return self._stream.quantized_bytes(param_name.rpartition(".")[0]) / param.numel()

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """What transformers applies to the weights that need it."""
        return QuantizeOnLoad(self)

    def take(self, model: nn.Module, param_name: str, weight: Tensor) -> None:
        """Quantize a weight that was just read.

        An error is kept until the loading ends: transformers would turn it into one line of a report.
        """
        if self._failure is not None or self._stream is None:
            return
        try:
            self._stream.quantize(model, param_name.rpartition(".")[0], weight)
        except AutoQRAError as error:
            self._failure = error

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self._failure is not None:
            raise self._failure
        if self._stream is not None:
            self.quantization_config = self._stream.finish(model)
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
            self._stream = None
        else:
            check_filled(model, self.quantization_config.modules)
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        model.add_model_tags(list(BASE_TAGS))  # type: ignore[operator]  # all that push_to_hub lets us say
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Let transformers save the model as it is, and name its base; after a check that it can be read again.

        Raises:
            InvalidPlanError: NF4 layers, layers that were quantized or adapted after loading, or weights that
                transformers fuses in this architecture's files.
        """
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved
            return None, {}
        quantized = {name: layer for name, layer in model.named_modules() if isinstance(layer, QUANTIZED_LAYERS)}
        if any(isinstance(layer, NF4Linear) for layer in quantized.values()):
            raise InvalidPlanError(
                "A model with bitsandbytes NF4 layers cannot be saved quantized; save the adapter alone, or use the "
                "native backend (quant_backend='native')."
            )
        changed = sorted(quantized.keys() ^ self.quantization_config.quantized_modules.keys())
        if changed:
            raise InvalidPlanError(
                f"The quantized layers are not those that the model was loaded with, see {changed[:3]}; it could "
                "not be read again. Take adapters off with unload(), and quantize all layers while loading."
            )
        _check_not_fused(model, quantized)
        return None, base_metadata(model)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QUANTIZED_LAYERS)]:
            model.set_submodule(name, dense_layer(layer).to(dtype))
        return model


class QuantizeOnLoad(ConversionOps):
    """Takes the weights that the quantizer wants out of what transformers puts into the model.

    Args:
        hf_quantizer: that does the work.
    """

    def __init__(self, hf_quantizer: AutoQRAHfQuantizer) -> None:
        """Keep the quantizer."""
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Quantize; what is returned goes into the model as it is.

        Args:
            input_dict: parameter name to tensor, or to a list of one.
            model: that is being loaded.
            missing_keys: parameters that no one has given a value yet.
        """
        kept = {}
        for name, value in input_dict.items():
            if not self.hf_quantizer.param_needs_quantization(model, name):
                kept[name] = value
                continue
            self.hf_quantizer.take(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return kept


def _check_not_fused(model: nn.Module, module_names: Iterable[str]) -> None:
    """In some architectures several weights are one tensor in the file; codes cannot go in there beside weights."""
    for conversion in getattr(model, "_weight_conversions", None) or ():
        if not isinstance(conversion, WeightConverter):
            continue
        to_file = conversion.reverse_transform()
        fused = [name for name in module_names if to_file.rename_source_key(f"{name}.weight")[1] is not None]
        beside = [name for name in model.state_dict() if to_file.rename_source_key(name)[1] is not None]
        if fused and beside:
            raise InvalidPlanError(
                f"The weight of {fused[0]!r} is saved as one tensor with {beside[0]!r}, which is impossible when only "
                "some of them are quantized; quantize all of them or none, or save the adapter alone."
            )
