"""All commands: what they are for and which flags they have; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peft_autoqra.commands import folder_parsers
from peft_autoqra.commands.command_parser import CommandParser
from peft_autoqra.commands.recipe_flags import (
    ADAPTER,
    DATA,
    FIGURES,
    FINE_TUNE,
    MODEL,
    SCORING,
    SEARCH,
    WORKERS,
    Topic,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command; ``commands/NAME.py`` has its function ``run``.

    Attributes:
        summary: its line in ``autoqra --help``.
        description: above the flags of a command that takes a recipe; other parsers have their own.
        parser: of a command that takes no recipe.
        topics: of a command that takes one, in the order of its settings.
        most_used: flags on the first page of such a command.
        positional: what comes before the flags of such a command.
        output_dir: default of such a command; empty where it writes nothing there.
        goes_on: whether the same command goes on after it was interrupted.
        is_light: whether it needs neither PEFT nor transformers, nor the method known to them, which takes seconds.
    """

    summary: str
    description: str = ""
    parser: Callable[[], CommandParser] | None = None
    topics: tuple[Topic, ...] = ()
    most_used: tuple[str, ...] = ()
    positional: str = ""
    output_dir: str = ""
    goes_on: bool = False
    is_light: bool = False

    @property
    def usage(self) -> str:
        """Of a command that takes a recipe."""
        return f"{self.positional} [--config RECIPE.yaml] [--FIELD VALUE ...]".lstrip()


_INPUTS = ("model_name_or_path", "train_file", "dataset_name", "test_split_size")
_OUTPUTS = ("config", "output_dir", "dry_run", "json")

COMMANDS: Mapping[str, Command] = {
    "search": Command(
        summary="find the weight bits and LoRA rank of every layer within a memory budget",
        description="Find the weight bits and LoRA rank of every layer within a memory budget. A stopped search goes "
        "on.",
        topics=(MODEL, DATA, SEARCH, FINE_TUNE, WORKERS),
        most_used=(*_INPUTS, "memory_budget", "max_cost", "learning_rate", "max_length", *_OUTPUTS),
        output_dir="search-out",
        goes_on=True,
    ),
    "train": Command(
        summary="fine-tune with a plan, or with the same bits and rank everywhere",
        description="Fine-tune with a plan, or with the same bits and rank everywhere, and save the adapter.",
        topics=(MODEL, DATA, ADAPTER, FINE_TUNE),
        most_used=(*_INPUTS, "plan", "bits", "r", "learning_rate", "max_length", *_OUTPUTS),
        output_dir="adapter",
    ),
    "evaluate": Command(
        summary="judge a model by held-out loss, metrics and benchmark tasks; compare two",
        description="Judge MODEL, the folder or hub id of an adapter, a plan, a quantized base or any causal language "
        "model, by held-out loss, metrics and tasks of lm-evaluation-harness; --baseline compares it with another "
        "one, example by example.",
        topics=(MODEL, DATA, FIGURES, SCORING),
        positional="MODEL",
        most_used=(
            "eval_file",
            "dataset_name",
            "metric",
            "tasks",
            "baseline",
            "limit",
            "output_file",
            "max_length",
            "config",
            "dry_run",
            "json",
        ),
    ),
    "show": Command(
        summary="print a plan as a heat map, with its bytes by part",
        parser=folder_parsers.show_parser,
        is_light=True,
    ),
    "compare": Command(
        summary="print what is different between two plans",
        parser=folder_parsers.compare_parser,
        is_light=True,
    ),
    "report": Command(
        summary="write one HTML page about a search",
        parser=folder_parsers.report_parser,
        is_light=True,
    ),
    "push": Command(
        summary="upload a plan, an adapter or a quantized base to the Hugging Face Hub",
        parser=folder_parsers.push_parser,
    ),
    "export": Command(
        summary="write an adapter for vLLM, llama.cpp or transformers without this package",
        parser=folder_parsers.export_parser,
    ),
    "calibrate": Command(
        summary="measure beforehand what every bit-width and rank loses; searches start from it",
        description="Measure what every bit-width and rank of every layer loses, and keep the quantized layers. "
        "Searches with the same cache_dir (or output_dir), model, data and modules start from it. A stopped "
        "calibration goes on.",
        topics=(MODEL, DATA, SEARCH, FINE_TUNE),
        most_used=(*_INPUTS, "bit_choices", "rank_choices", "num_calibration_sequences", "cache_dir", *_OUTPUTS),
        output_dir="search-out",
        goes_on=True,
    ),
    "completion": Command(
        summary="print a script that completes commands and flags in your shell",
        parser=folder_parsers.completion_parser,
        is_light=True,
    ),
}
