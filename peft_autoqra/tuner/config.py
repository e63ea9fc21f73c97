"""Configuration of the PEFT method."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import DENSE_BITS, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, PlanCalibration
from peft_autoqra.plan_file import ADAPTER_FILE, FORMAT_VERSION
from peft_autoqra.replaced_file import replaced_file
from peft_autoqra.safetensors_file import check_can_be_read
from peft_autoqra.tuner.adapter_card import AdapterCard, FineTuneFigures
from peft_autoqra.tuner.patterns import check_counts, check_syntax
from peft_autoqra.tuner.rank_scaling import REFERENCE_RANK, alpha_of_rank

COMPENSATE = "compensate"
_REWRITING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")


def _lora_metadata(field_name: str) -> Mapping[str, Any]:
    return LoraConfig.__dataclass_fields__[field_name].metadata


@dataclass
class AutoQRAConfig(LoraConfig):
    """LoRA on a base whose linear layers are quantized module by module.

    Saved to disk it is an ordinary LoRA configuration with a few keys more, so PEFT without this package still reads
    the adapter as plain LoRA.

    Example:
        ```python
        config = AutoQRAConfig(bits=3, r=16, bits_pattern={"down_proj": 4}, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)  # quantizes in place, adds adapters
        ```

    Args:
        plan: bits and rank of every module: a :class:`~peft_autoqra.BitRankPlan`, a mapping like it, or a folder or
            hub id of one. It decides ``target_modules``, ``r``, ``rank_pattern``, ``bits``, ``bits_pattern``,
            ``group_size`` and ``quant_backend``; giving other values beside it is an error.
        bits: bits of the targeted modules without a plan: 2, 3, 4, 8 or 16 (unquantized).
        bits_pattern: module name or regular expression to bits, matched as ``rank_pattern`` is; takes precedence over
            ``bits``. A module that matches but is not targeted is quantized without an adapter. Applying the
            configuration writes the exact names here and into ``rank_pattern``.
        group_size: weights that share a scale; halved per module until it divides the input size.
        quant_backend: ``"native"``; ``"gptq"`` for the same format by error feedback, which takes a calibrated plan;
            or ``"bitsandbytes"`` for NF4 with double quantization (4 bits) and row-wise int8 (8 bits).
        init_lora_weights: None takes the plan's initialization; ``"compensate"`` starts the adapter at the calibrated
            correction of the quantization error (needs a calibrated plan); ``True`` starts at zero as plain LoRA does.
        lora_alpha: None takes the value that the plan was searched with, else 8.
        use_rslora: None means True: scaling ``lora_alpha / sqrt(r)``. Modules of a plan are scaled by ``16 / r`` times
            that, which is written into ``alpha_pattern``, and start with longer rows of A, so that one learning rate
            fits every rank (:mod:`peft_autoqra.tuner.rank_scaling`). False, or an ``alpha_pattern`` of your own, turns
            this off.
        target_modules: without a plan ``"all-linear"`` by default.
        base_fingerprint: hash of the base weights the configuration was made for; filled in when it is applied.
        calibration_digest: of the calibration that the base was quantized with, which then lies beside the adapter;
            filled in.
        base_is_quantized: whether ``base_model_name_or_path`` holds a base that this package quantized; filled in.
        autoqra_version: version of the format on disk; not to be set by hand.

    All other arguments are :class:`peft.LoraConfig`'s.

    Raises:
        InvalidPlanError: an unsupported bit-width, a pattern that is no regular expression, an initialization that
            rewrites the base weights, or arguments that contradict the plan.
    """

    if TYPE_CHECKING:
        target_modules: Any
        alpha_pattern: Any

    # PEFT reads the metadata of these three fields, so a new default must keep it.
    init_lora_weights: Any = field(default=None, metadata=_lora_metadata("init_lora_weights"))
    use_rslora: bool | None = field(default=None, metadata=_lora_metadata("use_rslora"))
    lora_alpha: int | None = field(default=None, metadata=_lora_metadata("lora_alpha"))
    plan: Any = None
    bits: int = 4
    bits_pattern: dict[str, int] = field(default_factory=dict)
    group_size: int = 64
    quant_backend: Literal["native", "gptq", "bitsandbytes"] = "native"
    base_fingerprint: str | None = None
    calibration_digest: str | None = None
    base_is_quantized: bool = False
    autoqra_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Apply the plan, check, and let LoraConfig do its part."""
        if isinstance(self.plan, str | Path):
            self.plan = BitRankPlan.from_pretrained(self.plan)
        elif isinstance(self.plan, Mapping) and not isinstance(self.plan, BitRankPlan):
            self.plan = BitRankPlan(self.plan)
        self.calibration: PlanCalibration | None = None
        is_new_plan = self.plan is not None and self._apply_plan(self.plan)
        if self.plan is None and self.target_modules is None:
            self.target_modules = "all-linear"
        self.quantizer = QuantizerSettings(backend=self.quant_backend, group_size=self.group_size)
        self._check_values()
        if self.init_lora_weights is None:
            self.init_lora_weights = True
        if self.use_rslora is None:
            self.use_rslora = True
        if self.lora_alpha is None:
            self.lora_alpha = LoraConfig.lora_alpha
        if is_new_plan and self.use_rslora and not self.alpha_pattern:
            self.alpha_pattern = self._alphas_by_rank(self.lora_alpha)
            self._check_alphas()
        super().__post_init__()

    def _apply_plan(self, plan: BitRankPlan) -> bool:
        """Take over what the plan decides, and say whether it was not there already."""
        if not isinstance(plan, BitRankPlan):
            raise InvalidPlanError(f"plan={plan!r} must be a BitRankPlan, a mapping like one, a folder or a hub id.")
        bits_pattern = {exact_pattern(name): layer.bits for name, layer in plan.items()}
        self.calibration = plan.calibration
        if self.bits_pattern == bits_pattern:  # a copy made by dataclasses.replace, as PEFT does to combine adapters
            return False
        ranks = {name: layer.rank for name, layer in plan.items() if layer.rank}
        if not ranks:
            raise InvalidPlanError("Every rank of the plan is 0: there is nothing to train. Give some module a rank.")
        self._check_nothing_contradicts(plan)
        self.target_modules = list(ranks)
        self.r = max(ranks.values())
        self.rank_pattern = {exact_pattern(name): rank for name, rank in ranks.items() if rank != self.r}
        self.bits_pattern = bits_pattern
        self.quant_backend, self.group_size = plan.quantizer.backend, plan.quantizer.group_size
        self.base_fingerprint = plan.base_model.fingerprint
        adapter_calibration = self._adapter_calibration()
        self.calibration_digest = adapter_calibration.digest if adapter_calibration else None
        if self.lora_alpha is None:
            self.lora_alpha = plan.provenance.get("lora_alpha")
        if self.init_lora_weights is None and plan.initialization == COMPENSATE:
            self.init_lora_weights = COMPENSATE
        return True

    def scales_by_rank(self, module_name: str) -> bool:
        """Whether this module's adapter has the scaling that lets one learning rate fit every rank.

        See :mod:`peft_autoqra.tuner.rank_scaling`. At the reference rank it would change nothing, so not there.

        Args:
            module_name: as the plan names it; False for others.
        """
        alpha = self.alpha_pattern.get(exact_pattern(module_name))
        if alpha is None or self.lora_alpha is None or not self.use_rslora:
            return False
        rank = self.plan[module_name].rank if self.plan is not None and module_name in self.plan else 0
        return rank > 0 and bool(alpha == alpha_of_rank(self.lora_alpha, rank))

    def _alphas_by_rank(self, lora_alpha: float) -> dict[str, float]:
        """The alpha of every module of the plan whose rank is not the reference's."""
        ranks = {name: layer.rank for name, layer in self.plan.items() if layer.rank not in (0, REFERENCE_RANK)}
        return {exact_pattern(name): alpha_of_rank(lora_alpha, rank) for name, rank in ranks.items()}

    def _check_nothing_contradicts(self, plan: BitRankPlan) -> None:
        """Defaults cannot be told from values that were not given, so they pass."""
        given = [name for name in ("target_modules", "rank_pattern", "bits_pattern") if getattr(self, name)]
        bits = {layer.bits for layer in plan.values()}
        decided = {
            "r": max(layer.rank for layer in plan.values()),
            "bits": min(bits) if len(bits) == 1 else AutoQRAConfig.bits,
            "group_size": plan.quantizer.group_size,
            "quant_backend": plan.quantizer.backend,
        }
        given += [n for n, value in decided.items() if getattr(self, n) not in (value, getattr(AutoQRAConfig, n))]
        if given:
            raise InvalidPlanError(f"The plan already decides {given}; leave them out, or give no plan.")

    def _adapter_calibration(self) -> PlanCalibration | None:
        return self.calibration.without_corrections() if self.calibration is not None else None

    def _check_values(self) -> None:
        for bits in (self.bits, *self.bits_pattern.values()):
            LayerPlan(bits, 0)
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            if LayerPlan(DENSE_BITS, rank).rank == 0:
                raise InvalidPlanError(
                    "rank 0: an adapter needs a rank of at least 1. Only a plan may hold 0 (no adapter); without one, "
                    "narrow target_modules."
                )
        self._check_alphas()
        check_syntax(vars(self))
        check_counts(
            {name: value for name, value in vars(self).items() if name not in ("rank_pattern", "bits_pattern")}
        )
        check_leaves_weights(self)
        if self.init_lora_weights == "eva":
            raise InvalidPlanError(
                "init_lora_weights='eva' redistributes ranks, which the plan or rank_pattern decides here; use "
                "'compensate' (calibrated correction) or True (zero)."
            )
        if self.init_lora_weights == COMPENSATE and self.calibration is None:
            raise InvalidPlanError(
                "init_lora_weights='compensate' needs a plan with calibration; search one, calibrate it with "
                "peft_autoqra.calibrate_plan(...), or use init_lora_weights=True."
            )
        if self.layer_replication:
            raise InvalidPlanError("layer_replication is not supported with AutoQRA; replicate the layers beforehand.")

    def _check_alphas(self) -> None:
        alphas = [] if self.lora_alpha is None else [("lora_alpha", self.lora_alpha)]
        for field_name, alpha in [
            *alphas,
            *(("alpha_pattern", alpha) for alpha in (self.alpha_pattern or {}).values()),
        ]:
            is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not is_number or not 0 < alpha <= sys.float_info.max:
                raise InvalidPlanError(
                    f"{field_name} is {reprlib.repr(alpha)}; give a finite positive number such as 8; where it comes "
                    "from a plan's provenance, give lora_alpha beside the plan."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content. The plan is left out: the patterns say the same."""
        plan, self.plan = self.plan, None
        try:
            content = super().to_dict()
        finally:
            self.plan = plan
        del content["plan"]
        if content["init_lora_weights"] == COMPENSATE:
            content["init_lora_weights"] = True  # plain PEFT refuses names that it does not know
        return content

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, the calibration that a reload needs, the plan into the adapter's header, a card.

        The card is a section of the README.md that PEFT wrote before.
        """
        super().save_pretrained(save_directory, **kwargs)
        directory = Path(save_directory)
        calibration = self._adapter_calibration()
        if calibration is not None:
            calibration.save(directory, ADAPTER_CALIBRATION_FILE)
        adapter = directory / ADAPTER_FILE
        if self.plan is not None and adapter.exists():
            # the trained adapter has taken the place of the corrections, so whoever trains the plan again starts at 0
            plan = self.plan.replace(initialization="zero", calibration=calibration)
            _add_header(adapter, plan.to_metadata())
        if self.plan is not None:
            self.card().write(directory)

    def card(self, finetune: FineTuneFigures | None = None) -> AdapterCard:
        """What a model card says about an adapter of this configuration, once a model has it.

        Args:
            finetune: what was measured.
        """
        base_model = self.base_model_name_or_path or self.plan.base_model.name_or_path
        task_type = getattr(self.task_type, "value", self.task_type)
        return AdapterCard(
            plan=self.plan,
            base_model=base_model,
            base_is_quantized=self.base_is_quantized,
            task_type=task_type,
            finetune=finetune,
        )


def check_leaves_weights(config: LoraConfig) -> None:
    """Refuse what rewrites the base weights, or starts from their singular vectors: they are quantized.

    Raises:
        InvalidPlanError: ``init_lora_weights`` or a variant of LoRA does so.
    """
    if str(config.init_lora_weights).lower().startswith(_REWRITING_INITS):
        raise InvalidPlanError(
            f"init_lora_weights={config.init_lora_weights!r} rewrites or needs the 16-bit base weights, which are "
            "quantized here; use 'compensate' of a calibrated plan, or True (zero)."
        )
    if config.kasa_config is not None:
        raise InvalidPlanError("kasa_config truncates the base weights, which are quantized here; leave it out.")


def exact_pattern(module_name: str) -> str:
    """A pattern that matches this module and no other; PEFT takes the first match, so patterns must not overlap."""
    return f"^{re.escape(module_name)}"


def _add_header(path: Path, metadata: dict[str, str]) -> None:
    """Rewrite a safetensors file with more metadata; atomic."""
    with safe_open(path, framework="pt") as file:
        merged = {**(file.metadata() or {}), **metadata}
        check_can_be_read(path, {key: file.get_slice(key).get_shape() for key in file.keys()}, merged)  # noqa: SIM118
    with replaced_file(path) as partial:
        save_file(load_file(path), partial, metadata=merged)
