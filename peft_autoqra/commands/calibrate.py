"""``autoqra calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_autoqra.commands.searcher_recipe import read_searcher
from peft_autoqra.commands.tables import text_table
from peft_autoqra.importance.error_table import ErrorTable
from peft_autoqra.searcher import AutoQRASearcher
from peft_autoqra.units import format_bytes

DESCRIPTION = (
    "Measure what every bit-width and rank of every layer loses, and keep the quantized layers. Searches with the "
    "same cache_dir (or output_dir), model, data and modules start from it. A stopped calibration goes on."
)
TABLE_FILE = "error_table.safetensors"


def run(argv: Sequence[str]) -> int:
    """Calibrate, or say what would be kept with ``--dry_run``; returns the exit status.

    Raises:
        AutoQRAError: settings, data, model or output directory cannot be used.
    """
    searcher, _, options = read_searcher("calibrate", DESCRIPTION, argv)
    if options.dry_run:
        print(_forecast(searcher))  # noqa: T201
        return 0
    table = searcher.calibrate().error_table
    path = searcher.cache_dir / TABLE_FILE
    table.save(path)
    print(rises_text(table, searcher.setup.space.rank_choices))  # noqa: T201
    print(f"table   {path}\ncache   {searcher.cache_dir} ({format_bytes(_size(searcher.cache_dir))})")  # noqa: T201
    return 0


def rises_text(table: ErrorTable, rank_choices: Sequence[int]) -> str:
    """Estimated loss rise of uniform plans, summed over all modules."""
    rows = [
        [f"{bits} bits", *(f"{table.rises[:, index, rank].sum():.4g}" for rank in rank_choices)]
        for index, bits in enumerate(table.bit_choices)
    ]
    return "\n".join(
        [
            "Estimated rise of the loss before training, nats per token, for the same bits and rank everywhere:",
            text_table(["", *(f"r={rank}" for rank in rank_choices)], rows),
        ]
    )


def _forecast(searcher: AutoQRASearcher) -> str:
    """What a dry run prints."""
    setup = searcher.setup
    tokens = sum(batch["input_ids"].numel() for batch in setup.calibration_batches)
    bank, statistics = setup.calibration_bytes()
    shape = setup.model.config.get_text_config()
    activations = (shape.num_hidden_layers + 1) * tokens * shape.hidden_size * setup.model.dtype.itemsize
    return (
        f"{len(setup.linears)} modules, {tokens:,} tokens of {setup.config.num_calibration_sequences} sequences at "
        f"most. Kept in {searcher.cache_dir}: at most {format_bytes(statistics)} of statistics and "
        f"{format_bytes(bank)} of quantized layers and adapters. While it runs, {format_bytes(activations)} of "
        "activations beside that."
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
