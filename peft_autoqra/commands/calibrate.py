"""``autoqra calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.searcher_recipe import read_searcher
from peft_autoqra.commands.tables import text_table
from peft_autoqra.importance.error_table import ErrorTable
from peft_autoqra.searcher import AutoQRASearcher
from peft_autoqra.units import format_bytes

TABLE_FILE = "error_table.safetensors"


def run(argv: Sequence[str]) -> Outcome:
    """Calibrate, or say what would be kept with ``--dry_run``.

    Raises:
        AutoQRAError: settings, data, model or output directory cannot be used.
    """
    searcher, _, options = read_searcher("calibrate", argv)
    if options.dry_run:
        forecast = calibration_forecast(searcher)
        return Outcome(forecast_text(forecast), {"dry_run": True, **asdict(forecast)})
    table = searcher.calibrate().error_table
    path = searcher.cache_dir / TABLE_FILE
    table.save(path)
    ranks, cache_bytes = searcher.setup.space.rank_choices, _size(searcher.cache_dir)
    lines = [
        rises_text(table, ranks),
        f"table   {path}",
        f"cache   {searcher.cache_dir} ({format_bytes(cache_bytes)})",
    ]
    figures = {
        "dry_run": False,
        "uniform_rises": uniform_rises(table, ranks),
        "table": str(path),
        "cache_dir": str(searcher.cache_dir),
        "cache_bytes": cache_bytes,
    }
    return Outcome("\n".join(lines), figures)


def uniform_rises(table: ErrorTable, rank_choices: Sequence[int]) -> list[dict[str, float]]:
    """Estimated loss rise of uniform plans before training, nats per token, summed over all modules."""
    return [
        {"bits": bits, "rank": rank, "rise": float(table.rises[:, index, rank].sum())}
        for index, bits in enumerate(table.bit_choices)
        for rank in rank_choices
    ]


def rises_text(table: ErrorTable, rank_choices: Sequence[int]) -> str:
    """:func:`uniform_rises` as a table."""
    rises = {(rise["bits"], rise["rank"]): rise["rise"] for rise in uniform_rises(table, rank_choices)}
    rows = [[f"{bits} bits", *(f"{rises[bits, rank]:.4g}" for rank in rank_choices)] for bits in table.bit_choices]
    return "\n".join(
        [
            "Estimated rise of the loss before training, nats per token, for the same bits and rank everywhere:",
            text_table(["", *(f"r={rank}" for rank in rank_choices)], rows),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationForecast:
    """What a calibration will take.

    Attributes:
        num_modules: that are planned.
        num_sequences: at most.
        num_tokens: of them.
        cache_dir: where results are kept.
        statistics_bytes: that are kept, at most.
        bank_bytes: of quantized layers and adapters that are kept, at most.
        activation_bytes: that lie on disk beside that meanwhile.
    """

    num_modules: int
    num_sequences: int
    num_tokens: int
    cache_dir: str
    statistics_bytes: int
    bank_bytes: int
    activation_bytes: int


def calibration_forecast(searcher: AutoQRASearcher) -> CalibrationForecast:
    """What the calibration of a search will take."""
    setup = searcher.setup
    tokens = sum(batch["input_ids"].numel() for batch in setup.calibration_batches)
    bank, statistics = setup.calibration_bytes()
    shape = setup.model.config.get_text_config()
    activations = (shape.num_hidden_layers + 1) * tokens * shape.hidden_size * setup.model.dtype.itemsize
    return CalibrationForecast(
        num_modules=len(setup.linears),
        num_sequences=setup.config.num_calibration_sequences,
        num_tokens=tokens,
        cache_dir=str(searcher.cache_dir),
        statistics_bytes=statistics,
        bank_bytes=bank,
        activation_bytes=activations,
    )


def forecast_text(forecast: CalibrationForecast) -> str:
    """What a dry run prints."""
    return (
        f"{forecast.num_modules} modules, {forecast.num_tokens:,} tokens of {forecast.num_sequences} sequences at "
        f"most. Kept in {forecast.cache_dir}: at most {format_bytes(forecast.statistics_bytes)} of statistics and "
        f"{format_bytes(forecast.bank_bytes)} of quantized layers and adapters. While it runs, "
        f"{format_bytes(forecast.activation_bytes)} of activations beside that."
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
