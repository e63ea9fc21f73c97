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
        objective: what is minimized, or maximized where greater is better: ``"loss"`` (held-out), ``"accuracy"``,
            ``"exact_match"``, the path or hub name of an `evaluate` metric, or ``"lm_eval:TASK"``; see
            :func:`~peft_autoqra.evaluation.named_objective.make_objective`.
        max_new_tokens: of texts that the model writes for a metric.
        num_eval_sequences: held-out sequences that a trial is scored on, at most; fewer where scoring would cost more
            than training.
        max_cost: what the search may cost, calibration included, in units of one full fine-tune with the recipe
            (tokens passed forward and backward; see :class:`~peft_autoqra.search_costs.SearchCosts`).
        max_trials: trials at most; None for as many as ``max_cost`` allows.
        max_seconds: wall-clock time at most, however many workers there are; when most of it is gone, nothing more is
            explored. Trials under way still end. What is found then depends on the machine. None for no limit.
        max_trial_seconds: a trial that takes longer is stopped and counts as failed; None for no limit.
        num_seeds: training seeds that the finalists and the best baseline are confirmed with.
        learning_rate_factors: finalists are tried with the recipe's learning rate times each.
        lora_alpha: adapters are scaled by ``lora_alpha / sqrt(rank) * 16 / rank``.
        cache_dir: where calibration is kept for later searches on the same model and data; None means in output_dir.
        materialize: keep the dense weights of every bit-width in memory, which makes trials start faster and changes
            nothing else; None where they fit into half of the free memory.
        resume: continue what output_dir holds; False refuses to.

    Raises:
        InvalidPlanError: a choice or count that is no integer, or is negative or zero where one is needed.
    """

    memory_budget: str = field(
        default="qlora-4bit-r16",
        metadata={
            "help": "Limit: bytes such as 6GB, stored bits per weight such as 3.2bit, or [0.75*]qlora-4bit-r16."
        },
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "Whether the budget limits what training holds, or what is stored; by default stored for "
            "3.2bit, else training.",
            "choices": ["training", "stored"],
        },
    )
    bit_choices: list[int] = field(
        default_factory=lambda: [2, 3, 4, 8, 16], metadata={"help": "Bits per weight to choose from."}
    )
    rank_choices: list[int] = field(
        default_factory=lambda: [0, 4, 8, 16, 32, 64], metadata={"help": "LoRA ranks to choose from; 0 is no adapter."}
    )
    granularity: str = field(
        default="module",
        metadata={"help": "Which modules share a decision.", "choices": ["module", "fused", "block", "layer"]},
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to plan; all linear layers but the head by default."}
    )
    group_size: int = field(default=64, metadata={"help": "Number of weights that share a scale."})
    quantizer: Literal["native", "gptq"] = field(
        default="native", metadata={"help": "native, or gptq: loses less, but plans and adapters are larger."}
    )
    num_calibration_sequences: int = field(
        default=64, metadata={"help": "Number of training sequences for calibration."}
    )
    objective: str = field(
        default="loss",
        metadata={"help": "What decides: loss, accuracy, exact_match, METRIC.py, a hub metric or lm_eval:TASK."},
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens of a text written for a metric, at most."})
    num_eval_sequences: int = field(default=64, metadata={"help": "Number of held-out sequences that score a trial."})
    max_cost: float = field(
        default=1.0, metadata={"help": "What the search may cost, in full fine-tunes, calibration included."}
    )
    max_trials: int | None = field(
        default=None, metadata={"help": "Number of trials at most; as many as max_cost allows by default."}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "Wall-clock seconds of the search at most; no limit by default."}
    )
    max_trial_seconds: float | None = field(
        default=None, metadata={"help": "Seconds of one trial at most; no limit by default."}
    )
    num_seeds: int = field(default=3, metadata={"help": "Number of training seeds for finalists."})
    learning_rate_factors: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Finalists are tried with the learning rate times each factor."},
    )
    lora_alpha: int = field(
        default=8, metadata={"help": "Scale of the adapters is lora_alpha / sqrt(rank) * 16 / rank."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where calibration is kept; in output_dir by default.", "metavar": "DIR"}
    )
    materialize: bool | None = field(
        default=None, metadata={"help": "Keep dense weights of every bit-width in memory; by default where they fit."}
    )
    resume: bool = field(default=True, metadata={"help": "Continue what the output directory holds."})

    def __post_init__(self) -> None:
        """Check counts; choices and budget are checked against the model."""
        for name in ("bit_choices", "rank_choices"):
            if not all(_is_integer(choice) for choice in getattr(self, name)):
                raise InvalidPlanError(f"{name}={getattr(self, name)} must hold integers.")
        counts = ("num_calibration_sequences", "num_eval_sequences", "num_seeds", "lora_alpha", "max_new_tokens")
        for name in counts:
            self._require(name, 1)
        if self.max_trials is not None:
            self._require("max_trials", 1)
        self._check_limits()
        if not any(rank > 0 for rank in self.rank_choices):
            raise InvalidPlanError(f"rank_choices={self.rank_choices} hold no rank above 0; nothing could be trained.")
        if self.quantizer not in ("native", "gptq"):
            raise InvalidPlanError(
                f"quantizer={self.quantizer!r} takes no calibration, which a search needs; use 'native' or 'gptq'."
            )
        if self.scope not in (None, "training", "stored"):
            raise InvalidPlanError(f"scope={self.scope!r} must be 'training' or 'stored'.")

    def _check_limits(self) -> None:
        for name in ("max_cost", "max_seconds", "max_trial_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidPlanError(f"{name}={value!r} must be above 0.")
        factors = self.learning_rate_factors
        if not factors or factors[0] != 1 or not all(factor > 0 for factor in factors):
            raise InvalidPlanError(f"learning_rate_factors={factors} must be above 0, and the first one 1.")

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
