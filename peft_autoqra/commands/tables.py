"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.units import format_bytes

MEMORY_PARTS = {
    "weight_bytes": "weights",
    "metadata_bytes": "metadata",
    "untouched_bytes": "untouched",
    "adapter_bytes": "adapters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
}


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def memory_table(columns: Mapping[str, MemoryEstimate], *, exact: bool = False) -> str:
    """Bytes by part, one column for each estimate.

    Args:
        columns: title to estimate.
        exact: whole bytes in place of rounded units.
    """

    def show(num_bytes: int) -> str:
        return f"{num_bytes:,}" if exact else format_bytes(num_bytes)

    rows = [
        [title, *(show(getattr(memory, name)) for memory in columns.values())] for name, title in MEMORY_PARTS.items()
    ]
    rows.append(["stored", *(show(memory.stored_bytes) for memory in columns.values())])
    rows.append(["training", *(show(memory.total_bytes) for memory in columns.values())])
    return text_table(["bytes" if exact else "memory", *columns], rows)


def memory_data(memory: MemoryEstimate | None) -> dict[str, int] | None:
    """Bytes by part and their sums, for programs."""
    if memory is None:
        return None
    return {**memory.to_dict(), "stored_bytes": memory.stored_bytes, "total_bytes": memory.total_bytes}
