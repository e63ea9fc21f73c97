"""Settings of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft_autoqra.errors import InvalidPlanError, SearchStateError


@dataclass(frozen=True, kw_only=True)
class SearchArguments:
    """What to search and how much to spend on it; also the command line's flags.

    Attributes:
        memory_budget: bytes, ``"6GB"``, ``"3.2bit"``, ``"qlora-4bit-r16"`` or a multiple such as
            ``"0.75*qlora-4bit-r16"``; see :func:`~peft_autoqra.memory.resolve_budget`.
        scope: ``"training"`` or ``"stored"``; None takes what the budget's form suggests.
        bit_choices: bits that a module may get.
        rank_choices: ranks that a module may get; 0 means no adapter.
        granularity: which modules share a decision: ``"module"``, ``"fused"``, ``"block"`` or ``"layer"``.
        target_modules: names or suffixes of the modules to plan; None means all linear layers but the head.
        group_size: weights that share a quantization scale.
        quantizer: ``"native"``, or ``"gptq"``: loses less, but plan and adapter carry the quantized weights.
        num_calibration_sequences: training sequences that importance is measured on.
        num_eval_sequences: held-out sequences that a trial is scored on.
        population_size: of the evolution.
        num_generations: of the evolution, at most; 0 skips it.
        num_promoted: evolved candidates that get a short training run.
        num_trust_region_trials: short runs that the Bayesian stage may spend; 0 skips it.
        short_steps: training steps of a short run.
        final_steps: training steps of the runs that decide among the finalists.
        num_finalists: searched plans that get a final run beside the baselines.
        lora_alpha: adapters are scaled by ``lora_alpha / sqrt(rank)``.
        cache_dir: where calibration is kept for later searches on the same model and data; None means in output_dir.
        materialize: keep the dense weights of every bit-width in memory, which makes trials start faster and changes
            nothing else; None where they fit into half of the free memory.
        resume: continue what output_dir holds; False refuses to.

    Raises:
        InvalidPlanError: a choice or count that is no integer, or is negative or zero where one is needed.
    """

    memory_budget: str = field(default="qlora-4bit-r16", metadata={"help": "Bytes, 6GB, 3.2bit, qlora-4bit-r16, ..."})
    scope: str | None = field(default=None, metadata={"help": "What the budget limits: training or stored."})
    bit_choices: list[int] = field(default_factory=lambda: [2, 3, 4, 8, 16], metadata={"help": "Bits to choose from."})
    rank_choices: list[int] = field(
        default_factory=lambda: [0, 4, 8, 16, 32, 64], metadata={"help": "Ranks to choose from."}
    )
    granularity: str = field(default="module", metadata={"help": "module, fused, block or layer."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to plan; all linear by default."}
    )
    group_size: int = field(default=64, metadata={"help": "Weights that share a quantization scale."})
    quantizer: Literal["native", "gptq"] = field(
        default="native", metadata={"help": "native, or gptq: loses less, but plans and adapters are larger."}
    )
    num_calibration_sequences: int = field(default=64, metadata={"help": "Training sequences for calibration."})
    num_eval_sequences: int = field(default=64, metadata={"help": "Held-out sequences that a trial is scored on."})
    population_size: int = field(default=12, metadata={"help": "Population of the evolution."})
    num_generations: int = field(default=4, metadata={"help": "Generations of the evolution at most; 0 skips it."})
    num_promoted: int = field(default=3, metadata={"help": "Evolved candidates that get a short training run."})
    num_trust_region_trials: int = field(default=4, metadata={"help": "Short runs of the Bayesian stage; 0 skips it."})
    short_steps: int = field(default=10, metadata={"help": "Training steps of a short run."})
    final_steps: int = field(default=30, metadata={"help": "Training steps of the finalists' runs."})
    num_finalists: int = field(default=2, metadata={"help": "Searched plans that get a final run."})
    lora_alpha: int = field(default=8, metadata={"help": "Adapters are scaled by lora_alpha / sqrt(rank)."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where calibration is kept for later searches."})
    materialize: bool | None = field(
        default=None, metadata={"help": "Keep dense weights of every bit-width in memory; by default where they fit."}
    )
    resume: bool = field(default=True, metadata={"help": "Continue what the output directory holds."})

    def __post_init__(self) -> None:
        """Check counts; choices and budget are checked against the model."""
        for name in ("bit_choices", "rank_choices"):
            if not all(_is_integer(choice) for choice in getattr(self, name)):
                raise InvalidPlanError(f"{name}={getattr(self, name)} must hold integers.")
        for name in ("num_calibration_sequences", "num_eval_sequences", "population_size", "num_finalists"):
            self._require(name, 1)
        for name in ("short_steps", "final_steps", "lora_alpha"):
            self._require(name, 1)
        for name in ("num_generations", "num_promoted", "num_trust_region_trials"):
            self._require(name, 0)
        if self.final_steps < self.short_steps:
            raise InvalidPlanError(f"final_steps={self.final_steps} must be at least short_steps={self.short_steps}.")
        if not any(rank > 0 for rank in self.rank_choices):
            raise InvalidPlanError(f"rank_choices={self.rank_choices} hold no rank above 0; nothing could be trained.")
        if self.quantizer not in ("native", "gptq"):
            raise InvalidPlanError(
                f"quantizer={self.quantizer!r} takes no calibration, which a search needs; use 'native' or 'gptq'."
            )
        if self.scope not in (None, "training", "stored"):
            raise InvalidPlanError(f"scope={self.scope!r} must be 'training' or 'stored'.")

    def _require(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or value < least:
            raise InvalidPlanError(f"{name}={value!r} must be an integer of at least {least}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class AutoQRASearchConfig(SearchArguments):
    """Settings of :class:`~peft_autoqra.AutoQRASearcher`: :class:`SearchArguments` and two of the recipe's.

    Attributes:
        seed: of the stages and the training runs.
        output_dir: trials, plan and report go there.
    """

    seed: int = 0
    output_dir: str = "search-out"

    def __post_init__(self) -> None:
        """Check."""
        super().__post_init__()
        if not self.output_dir:
            raise SearchStateError("output_dir is empty; name a directory for the search.")
