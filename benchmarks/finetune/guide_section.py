"""What docs/finetuning-benchmark.md holds between its markers: all tables of all configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.finetune.grid import LEAST_SWEPT
from benchmarks.finetune.provenance import describe_runs, describe_setting
from benchmarks.finetune.readme_section import NOTHING, paragraph
from benchmarks.finetune.results import Results
from benchmarks.finetune.tables import (
    claims_table,
    cost_table,
    honesty_table,
    losses_table,
    memory_sentence,
    memory_table,
    missing_notes,
    rates_at_the_edge,
    rates_table,
    rivals_table,
)

_ALT = {
    "memory": "Loss minus QLoRA's over the memory of training, a panel for each task",
    "differences": "Loss minus QLoRA's with 95% intervals by method, a panel for each task",
}


def guide_section(found: Sequence[Results], pictures: Mapping[str, Sequence[Path]]) -> str:
    """Of all configurations with records.

    Args:
        found: in order.
        pictures: by name of the configuration; they lie beside the guide.
    """
    blocks = [block for results in found for block in _blocks(results, pictures.get(results.config.name, ()))]
    return "\n\n".join(blocks) or NOTHING


def _blocks(results: Results, pictures: Sequence[Path]) -> Iterator[str]:
    if not results.methods:
        return
    yield f"## Results: {results.config.name}"
    yield paragraph(describe_setting(results.config))
    yield paragraph(describe_runs(results))
    for picture in pictures:
        yield f"![{_ALT[picture.stem.rpartition('-')[2]]}]({picture.name})"
    if notes := missing_notes(results):
        yield "Missing:\n" + "\n".join(f"- {note}." for note in notes)
    if results.claims:
        yield "### What was to be shown"
        yield claims_table(results)
    for task in results.config.tasks:
        if any(cell[0] == task and runs.runs for cell, runs in results.cells.items()):
            yield f"### Losses: {task}"
            yield losses_table(results, task)
    if rivals := rivals_table(results):
        yield "### Within the same memory"
        yield rivals
    yield "### Memory"
    yield paragraph(f"Of the real tensors, in MB. {memory_sentence(results)}")
    yield memory_table(results)
    yield honesty_table(results)
    yield "### Cost"
    yield paragraph("Medians over tasks and seeds.")
    yield cost_table(results)
    yield "### Learning rates"
    yield paragraph(f"Loss on the development split after training with the first seed.{_edge_sentence(results)}")
    yield rates_table(results)


def _edge_sentence(results: Results) -> str:
    """Nothing where there is no middle to be best."""
    if len(results.config.learning_rates) < LEAST_SWEPT:
        return ""
    at_edge, num_cells = rates_at_the_edge(results)
    return f" In {at_edge} of {num_cells} rows the best one is the smallest or largest that was tried."
