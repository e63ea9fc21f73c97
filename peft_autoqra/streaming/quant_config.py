"""What ``AutoModelForCausalLM.from_pretrained(quantization_config=...)`` takes, and config.json keeps."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_MODULES, check_module_name
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_file import FORMAT_VERSION
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.patterns import check_patterns_of_file

METHOD = "autoqra"
"""``quant_method`` in config.json."""


@dataclass(frozen=True, kw_only=True)
class QuantizedModule:
    """One linear layer of a quantized base.

    Attributes:
        bits: of its weight; 16 means unquantized.
        shape: of its weight, (out_features, in_features).
        group_size: weights that share a scale; None at 16 bits and with bitsandbytes.
        calibration_digest: hash of what the codes were fitted with beside the weight; None without calibration.

    Raises:
        InvalidPlanError: bits, a shape, a group size or a digest that no layer can have.
    """

    bits: int
    shape: tuple[int, int]
    group_size: int | None = None
    calibration_digest: str | None = None

    def __post_init__(self) -> None:
        """Check the values; JSON has lists only."""
        LayerPlan(self.bits, 0)
        if self.group_size is not None:
            QuantizerSettings(group_size=self.group_size)
        shape = tuple(self.shape)
        if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            raise InvalidPlanError(f"shape={reprlib.repr(shape)} must be two positive integers.")
        if not isinstance(self.calibration_digest, str | None):
            raise InvalidPlanError(f"calibration_digest={reprlib.repr(self.calibration_digest)} must be text.")
        object.__setattr__(self, "shape", shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModule:
        """Itself: it is immutable, and transformers copies configurations often."""
        return self


class AutoQRAQuantConfig(QuantizationConfigMixin):
    """How linear layers are quantized while a checkpoint is read.

    Give a plan, or bits for all linear layers but the head. Where a plan is calibrated its moments weight the fit, as
    they do when ``get_peft_model`` quantizes in place; both give the same codes.

    Args:
        plan: a :class:`~peft_autoqra.BitRankPlan`, a mapping like it, or a folder or hub id of one. Ranks play no
            part here. It decides all of the following.
        bits: 2, 3, 4, 8 or 16 without a plan.
        bits_pattern: module name or regular expression to bits, as in :class:`~peft_autoqra.AutoQRAConfig`.
        group_size: weights that share a scale; halved per module until it divides the input size.
        target_modules: as in ``LoraConfig``; ``"all-linear"`` by default.
        quant_backend: ``"native"``, or ``"bitsandbytes"`` for NF4 (4 bits), which cannot be saved, and int8 (8 bits).
            ``"gptq"`` comes with a plan only.
        base_fingerprint: of the weights that were quantized; filled in.
        modules: what each layer became; filled in when a model is loaded, and read from a saved one.
        quant_method: always ``"autoqra"``.
        autoqra_version: version of the format on disk; not to be set by hand.
        unknown: keys of a newer version; refused.

    Raises:
        InvalidPlanError: unsupported bits, arguments that contradict the plan, or a newer format.
    """

    def __init__(  # noqa: PLR0913 -- transformers passes every key of config.json
        self,
        plan: BitRankPlan | Mapping[str, Any] | str | Path | None = None,
        *,
        bits: int = 4,
        bits_pattern: Mapping[str, int] | None = None,
        group_size: int = 64,
        target_modules: str | Iterable[str] | None = None,
        quant_backend: Literal["native", "gptq", "bitsandbytes"] = "native",
        base_fingerprint: str | None = None,
        modules: Mapping[str, QuantizedModule | Mapping[str, Any]] | None = None,
        quant_method: str = METHOD,
        autoqra_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        """Check everything that needs no model."""
        _check_format(quant_method, autoqra_version, unknown)
        self.quant_method = METHOD
        self.autoqra_version = FORMAT_VERSION
        _check_types(bits_pattern, modules, base_fingerprint)
        self.plan = _read_plan(plan)
        self.bits = bits
        self.bits_pattern = dict(bits_pattern or {})
        self.group_size = group_size
        self.target_modules = _read_names(target_modules)
        self.quant_backend = quant_backend
        self.base_fingerprint = base_fingerprint
        self.modules = {name: _read_module(name, module) for name, module in (modules or {}).items()}
        if quant_backend == "gptq" and self.plan is None and not self.modules:
            raise InvalidPlanError(
                "quant_backend='gptq' needs a calibrated plan, which carries the codes; give plan=..."
            )
        if self.plan is not None and base_fingerprint not in (None, self.plan.base_model.fingerprint):
            raise InvalidPlanError(
                f"base_fingerprint={base_fingerprint!r} is not the plan's, {self.plan.base_model.fingerprint!r}; "
                "leave it out, or change it with plan.replace(base_model=...)."
            )
        self.to_adapter_config()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The configuration in a config.json; transformers calls this.

        Raises:
            InvalidPlanError: what the constructor refuses, patterns that could take for ever, or a plan that lies
                elsewhere.
        """
        if isinstance(config_dict.get("plan"), str):
            raise InvalidPlanError("The quantization_config of a model holds no plan by name; give it in Python.")
        check_patterns_of_file(config_dict)
        return super().from_dict(config_dict, *args, **kwargs)

    def to_adapter_config(self) -> AutoQRAConfig:
        """The settings as the adapter's configuration knows them, so that one code resolves and checks both.

        Every rank is 1: a plan without any adapter is fine for a base, and 1 fits every weight.
        """
        plan = self.plan
        if plan is not None:
            layers = {name: LayerPlan(layer.bits, 1) for name, layer in plan.items()}
            plan = plan.replace(layers=layers, initialization="zero")
        config = AutoQRAConfig(
            plan=plan,
            r=1,
            bits=self.bits,
            bits_pattern=dict(self.bits_pattern),
            group_size=self.group_size,
            target_modules=self.target_modules,
            quant_backend=self.quant_backend,
            task_type="SEQ_CLS",  # makes PEFT leave out classification heads too; without one it changes nothing
        )
        if self.base_fingerprint is not None:
            config.base_fingerprint = self.base_fingerprint
        return config

    def loaded(self, modules: Mapping[str, QuantizedModule], base_fingerprint: str | None) -> AutoQRAQuantConfig:
        """The configuration of the model that was loaded with this one; it holds no plan any more."""
        settings = self.to_adapter_config().quantizer
        return AutoQRAQuantConfig(
            group_size=settings.group_size,
            quant_backend=settings.backend,
            modules=modules,
            base_fingerprint=base_fingerprint,
        )

    def fingerprint_of(self, module_names: set[str]) -> str | None:
        """Fingerprint of the weights that were quantized, where these are the modules it was taken of."""
        return self.base_fingerprint if self.modules.keys() == module_names else None

    @property
    def quantized_modules(self) -> dict[str, QuantizedModule]:
        """Those below 16 bits."""
        return {name: module for name, module in self.modules.items() if module.bits != DENSE_BITS}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content, from which :meth:`from_dict` makes an equal configuration."""
        common = ("quant_method", "autoqra_version", "quant_backend", "group_size", "base_fingerprint")
        content: dict[str, Any] = {name: getattr(self, name) for name in common}
        if self.modules:
            return content | {"modules": {n: asdict(m) | {"shape": list(m.shape)} for n, m in self.modules.items()}}
        if self.plan is not None:
            return content | {"plan": self.plan.to_metadata()}
        names = ("bits", "bits_pattern", "target_modules")
        return content | {name: copy.deepcopy(getattr(self, name)) for name in names}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """So that ``dict(config)`` is :meth:`to_dict`."""
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        """By content."""
        return isinstance(other, AutoQRAQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _check_format(quant_method: str, version: int, unknown: Mapping[str, Any]) -> None:
    if quant_method != METHOD:
        raise InvalidPlanError(f"quant_method={quant_method!r} is of another quantizer; AutoQRA's is {METHOD!r}.")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InvalidPlanError(
            f"The quantized model has AutoQRA format {reprlib.repr(version)}, this peft_autoqra reads up to "
            f"{FORMAT_VERSION}: upgrade with `pip install -U peft-autoqra`."
        )
    if unknown:
        raise InvalidPlanError(
            f"AutoQRAQuantConfig does not know {reprlib.repr(sorted(unknown))}; it takes plan, or bits, bits_pattern, "
            "group_size, target_modules and quant_backend."
        )


def _check_types(bits_pattern: object, modules: object, base_fingerprint: object) -> None:
    for name, value in (("bits_pattern", bits_pattern), ("modules", modules)):
        if value is not None and not isinstance(value, Mapping):
            raise InvalidPlanError(f"{name}={reprlib.repr(value)} must be a mapping from module names.")
    if isinstance(modules, Mapping):
        _check_number("modules", len(modules))
        for name in modules:
            check_module_name(name)
    if not isinstance(base_fingerprint, str | None):
        raise InvalidPlanError(f"base_fingerprint={reprlib.repr(base_fingerprint)} must be text; leave it out.")


def _check_number(field: str, number: int) -> None:
    if number > MAX_MODULES:
        raise InvalidPlanError(
            f"{field} names {number} modules, at most {MAX_MODULES} are saved and read; name fewer."
        )


def _read_names(target_modules: str | Iterable[str] | None) -> str | list[str] | None:
    if target_modules is None or isinstance(target_modules, str):
        return target_modules
    names: list[Any] = list(target_modules) if isinstance(target_modules, Iterable) else [target_modules]
    if not all(isinstance(name, str) for name in names):
        raise InvalidPlanError(
            f"target_modules={reprlib.repr(target_modules)} must be 'all-linear', a pattern, or names."
        )
    _check_number("target_modules", len(names))
    return sorted(names)


def _read_plan(plan: BitRankPlan | Mapping[str, Any] | str | Path | None) -> BitRankPlan | None:
    if plan is None or isinstance(plan, BitRankPlan):
        return plan
    if isinstance(plan, str | Path):
        return BitRankPlan.from_pretrained(plan)
    if not isinstance(plan, Mapping):
        raise InvalidPlanError(f"plan={plan!r} must be a BitRankPlan, a mapping like one, a folder or a hub id.")
    if "autoqra_plan" not in plan:
        return BitRankPlan(plan)
    if plan.get("autoqra_calibration_digest"):
        raise InvalidPlanError(
            "The plan in this quantization configuration is calibrated, and JSON does not hold its calibration; give "
            "plan=BitRankPlan.from_pretrained(...)."
        )
    return BitRankPlan.from_metadata(cast("Mapping[str, str]", plan), "the quantization configuration")


def _read_module(name: str, module: QuantizedModule | Mapping[str, Any]) -> QuantizedModule:
    if isinstance(module, QuantizedModule):
        return module
    try:
        return QuantizedModule(**module)
    except (InvalidPlanError, TypeError) as error:
        raise InvalidPlanError(
            f"The entry of {name!r} in the model's quantization_config is damaged ({error}); save or download the "
            "model again."
        ) from error
