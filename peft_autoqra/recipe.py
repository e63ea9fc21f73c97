"""What a recipe file and the command line may say beside TRL's SFTConfig and the search's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_autoqra.errors import AutoQRAError
from peft_autoqra.plan import BACKENDS


class RecipeError(AutoQRAError, ValueError):
    """A recipe, flag, model or data file that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The base model; names as in TRL's ``ModelConfig``.

    Attributes:
        model_name_or_path: hub id or folder.
        model_revision: branch, tag or commit.
        dtype: of the unquantized weights; ``"auto"`` is the checkpoint's.
        attn_implementation: as in ``from_pretrained``.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the base model.", "metavar": "ID_OR_DIR"}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the base model."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the unquantized weights; auto is the checkpoint's.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Such as sdpa or flash_attention_2; transformers' choice by default."}
    )


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Training and held-out data; names as in TRL's ``ScriptArguments`` and transformers' run_clm.py.

    Attributes:
        dataset_name: hub id or folder.
        dataset_config: its configuration.
        dataset_train_split: a split or slice of one, such as ``"train[:1000]"``.
        dataset_test_split: likewise.
        train_file: a local file in place of ``dataset_name``.
        eval_file: likewise.
        test_split_size: fraction of the training data to hold out where there is no held-out data.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a data set.", "metavar": "ID_OR_DIR"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on, such as train[:1000]."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local .json(l), .csv, .parquet or .txt file to train on.", "metavar": "FILE"}
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Local .json(l), .csv, .parquet or .txt file to evaluate on.", "metavar": "FILE"},
    )
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Fraction (0 to 1) of the training data to hold out in place of other held-out data."},
    )

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            RecipeError: settings that contradict each other.
        """
        if self.dataset_name and self.train_file:
            raise RecipeError("Give dataset_name or train_file, not both.")
        if self.test_split_size is not None and not 0 < self.test_split_size < 1:
            raise RecipeError(f"test_split_size={self.test_split_size} must be a fraction between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments:
    """What a model is judged by; names of the tasks' settings as in lm-evaluation-harness.

    Attributes:
        metric: ``"accuracy"``, ``"exact_match"``, paths of metric scripts, or names on the hub.
        tasks: of lm-evaluation-harness, or paths of YAML files, separated by commas.
        num_fewshot: examples before each question of a task; None takes the task's own.
        apply_chat_template: put the questions of tasks as the model's chat template has them.
        limit: held-out examples, and examples of each task, at most; None for all.
        max_new_tokens: of texts that the model writes for a metric.
        baseline: another model, which the first is compared with example by example.
        output_file: where the figures are written, too.
    """

    metric: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Metrics beside the loss: accuracy, exact_match, METRIC.py, or one of the hub.",
            "metavar": "NAME",
        },
    )
    tasks: str | None = field(
        default=None,
        metadata={"help": "Tasks of lm-evaluation-harness, or YAML files; commas between.", "metavar": "NAMES"},
    )
    num_fewshot: int | None = field(
        default=None,
        metadata={"help": "Number of examples before each question of a task; the task's own by default."},
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "Ask the questions of tasks in the model's chat template."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "Number of examples at most, of the data and of each task; all by default."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens of a text written for a metric, at most."})
    baseline: str | None = field(
        default=None, metadata={"help": "Another model, to compare with.", "metavar": "ID_OR_DIR"}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "Also write the figures there, as JSON.", "metavar": "FILE"}
    )

    def __post_init__(self) -> None:
        """Check counts.

        Raises:
            RecipeError: a count that is out of its range.
        """
        for name, least in (("limit", 2), ("max_new_tokens", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name}={value} must be at least {least}.")


@dataclass(frozen=True, kw_only=True)
class AdapterArguments:
    """What a fine-tune does to the model: a plan's bits and ranks, or the same everywhere.

    Attributes:
        plan: folder or hub id of a plan.
        bits: of all layers without a plan; 4 by default.
        r: rank of all adapters without a plan; 16 by default.
        quant_backend: without a plan: ``"native"`` (default), ``"gptq"`` (the same by error feedback), or
            ``"bitsandbytes"`` for NF4 (4 bits) or int8 (8 bits).
        group_size: weights that share a scale, without a plan.
        target_modules: without a plan; None means all linear layers but the head.
        lora_alpha: adapters are scaled by ``lora_alpha / sqrt(rank) * 16 / rank``; None takes the plan's, else 8.
        lora_dropout: as in ``LoraConfig``.
        num_calibration_sequences: training sequences that a native uniform configuration is calibrated on; 0 skips it.
        stream: quantize by the plan while the model is read, and never hold the unquantized one.
    """

    plan: str | None = field(default=None, metadata={"help": "Folder or hub id of a plan.", "metavar": "ID_OR_DIR"})
    bits: int | None = field(
        default=None, metadata={"help": "Without a plan: bits per weight, 2, 3, 4, 8 or 16; 4 by default."}
    )
    # torchrun takes --r for an abbreviation of its own flags, hence TRL's name beside PEFT's.
    r: int | None = field(
        default=None, metadata={"help": "Without a plan: the LoRA rank; 16 by default.", "aliases": ["--lora_r"]}
    )
    quant_backend: str | None = field(
        default=None,
        metadata={
            "help": "Without a plan: native, gptq, or bitsandbytes (4 bits: NF4; 8 bits: int8); native by default.",
            "choices": list(BACKENDS),
        },
    )
    group_size: int = field(default=64, metadata={"help": "Without a plan: number of weights that share a scale."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Without a plan: modules; all linear layers but the head by default."}
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={
            "help": "Scale of the adapters is lora_alpha / sqrt(rank) * 16 / rank; the plan's, or 8, by default."
        },
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Fraction (0 to 1) of the adapters' inputs that is dropped."}
    )
    num_calibration_sequences: int = field(
        default=64, metadata={"help": "Without a plan: number of training sequences for calibration; 0 skips it."}
    )
    stream: bool = field(
        default=True,
        metadata={"help": "With a plan: quantize while the model is read, and never hold it unquantized."},
    )

    def __post_init__(self) -> None:
        """A plan decides alone.

        Raises:
            RecipeError: bits, rank or backend beside a plan, or a negative number.
        """
        given = [name for name in ("bits", "r", "quant_backend") if getattr(self, name) is not None]
        if self.plan is not None and given:
            raise RecipeError(f"The plan already decides {', '.join(given)}; leave them out, or give no plan.")
        if self.num_calibration_sequences < 0:
            raise RecipeError(f"num_calibration_sequences={self.num_calibration_sequences} must be at least 0.")
        if self.quant_backend == "gptq" and not self.num_calibration_sequences:
            raise RecipeError("quant_backend gptq needs calibration; raise num_calibration_sequences, or use native.")
