"""The README's part: short, and nothing that was not run."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.finetune.claims import FULL_BUDGET, LESS_BUDGET, Claim, contenders
from benchmarks.finetune.comparison import median_loss, median_metric
from benchmarks.finetune.figures import MISSING, megabytes, plain, share, signed, with_interval
from benchmarks.finetune.provenance import describe_runs, describe_setting
from benchmarks.finetune.results import Results, median_of
from benchmarks.finetune.tables import before_training, memory_sentence
from benchmarks.finetune.titles import base_name, budget_title, method_title
from peft_autoqra.markdown import markdown_table
from peft_autoqra.memory_estimate import MemoryEstimate, MemoryScope

_STORED_3, _STORED_2_5 = "stored:qlora-3bit-r16", "stored:qlora-2.5bit-r16"
ROWS: tuple[tuple[str, str | None], ...] = (
    ("lora-r16", None),
    ("qlora-r16", None),
    ("qlora-r4", None),
    ("qlora-r16-bf16", None),
    ("qlora-rslora-r64", None),
    ("qlora-loftq-r16", None),
    ("qlora-adalora", None),
    ("qlora-eva-r16", None),
    ("uniform-zero", FULL_BUDGET),
    ("uniform", FULL_BUDGET),
    ("sequential", FULL_BUDGET),
    ("autoround", FULL_BUDGET),
    ("published", FULL_BUDGET),
    ("autoqra", FULL_BUDGET),
    ("uniform", LESS_BUDGET),
    ("autoqra", LESS_BUDGET),
    ("uniform", _STORED_3),
    ("sequential", _STORED_3),
    ("autoqra", _STORED_3),
    ("uniform", _STORED_2_5),
    ("sequential", _STORED_2_5),
    ("autoqra", _STORED_2_5),
)
NOTHING = "Nothing is recorded yet."
_PLACES = {
    None: "",
    FULL_BUDGET: ", QLoRA's memory",
    LESS_BUDGET: ", 75% of it",
    _STORED_3: ", stored size of 3-bit QLoRA",
    _STORED_2_5: ", stored size of 2.5-bit QLoRA",
}
WIDTH = 120
_CLAIMS_LEGEND = (
    '"Yes" and "no": the 95% interval over seeds and examples leaves no other answer. "Not shown": it '
    "leaves another, both chose the same plan, or there is one seed only. Memory: what QLoRA r=16 takes "
    "with that many bits while training, or as stored."
)


def readme_section(results: Results | None, picture: Path | None) -> str:
    """Tables with what is needed to read them.

    Args:
        results: None without records.
        picture: losses over memory; from the README's folder.
    """
    if results is None or not results.tasks:
        return NOTHING
    claims = _claims_table(results)
    paragraphs = [
        describe_setting(results.config),
        _main_table(results),
        _legend(results),
        claims,
        _CLAIMS_LEGEND if claims else "",
        f"![Loss minus that of QLoRA r=16 over memory, a panel for each task]({picture})" if picture else "",
        f"{memory_sentence(results)} {describe_runs(results)}",
    ]
    return "\n\n".join(text if text.startswith(("|", "!")) else paragraph(text) for text in paragraphs if text)


def paragraph(text: str) -> str:
    """Wrapped as the rest of the file is."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def known_rows(results: Results) -> list[tuple[str, str | None]]:
    """Methods and budgets of the table, those with results."""
    rows = [(name, budget) for method, budget in ROWS for name in contenders(results.config, method)]
    return [row for row in rows if results.runs_of_all_tasks(*row)]


def _main_table(results: Results) -> str:
    known = known_rows(results)
    header = ["method", "MB: training, stored", "bits, rank", *results.tasks, "accuracy", "before training"]
    return markdown_table(header, [_main_row(results, *row) for row in known])


def _main_row(results: Results, method: str, budget: str | None) -> list[str]:
    cells = results.runs_of_all_tasks(method, budget)
    records = [record for runs in cells for record in runs.records]
    sizes = [record.memory.measured for record in records if record.memory is not None]
    before = before_training(results, records)
    return [
        f"{method_title(method)}{_PLACES[budget]}",
        f"{_megabytes(sizes, 'training')}, {_megabytes(sizes, 'stored')}",
        f"{plain(median_of(r.mean_bits for r in records), 1)}, {plain(median_of(r.mean_rank for r in records), 0)}",
        *(_loss_cell(results, task, method, budget) for task in results.tasks),
        " / ".join(_accuracy(results, task, method, budget) for task in results.tasks),
        plain(before, 2),
    ]


def _megabytes(sizes: Sequence[MemoryEstimate], scope: MemoryScope) -> str:
    return megabytes(statistics.median(size.in_scope(scope) for size in sizes) if sizes else None)


def _loss_cell(results: Results, task: str, method: str, budget: str | None) -> str:
    if (runs := results.runs(task, method, budget)) is None:
        return MISSING
    if (difference := results.loss_to_baseline(runs)) is None:
        return f"0 (loss {plain(median_loss(runs))})"  # the baseline itself, without which a task is not shown
    closed = results.gap_closed(runs)
    return with_interval(difference) + (f", {share(closed.value)}" if closed else "")


def _accuracy(results: Results, task: str, method: str, budget: str | None) -> str:
    runs = results.runs(task, method, budget)
    return plain(median_metric(runs), 2) if runs else MISSING


def _legend(results: Results) -> str:
    found = [results.runs(task, *row) for row in known_rows(results) for task in results.tasks]
    text = (
        f"{', '.join(results.tasks)}: held-out loss minus that of QLoRA r=16, nats per token (below 0 is better), "
        "median over seeds, in brackets 95% over seeds and held-out examples; then the share closed of its gap "
        "to 16-bit LoRA, whose intervals the guide has. Memory: all that training holds beside activations, and what "
        "of it is stored, weights and adapters. Bits and rank: medians over tasks of a plan's means. "
        "Accuracy: in the order of these tasks. Before training: search and calibration, in QLoRA "
        "fine-tunes by the clock."
    )
    if any(base_name(method) != method for method, _ in known_rows(results)):
        text += " Cost: what a search may spend, in fine-tunes by tokens."
    if not all(found):
        text += f" {MISSING}: no result yet, or none that can be had."
    if any(runs is not None and len(runs.runs) == 1 for runs in found):
        text += " Some rows have one seed only: their brackets are about other examples, not other seeds."
    return text


def _claims_table(results: Results) -> str:
    """Rows without a result are left out; rivals take one row for all budgets."""
    claims = [claim for claim in results.claims if claim.effect is not None]
    rows = [
        [f"{text}?", *(_one(claims, text, task) for task in results.tasks)]
        for text in dict.fromkeys(claim.text for claim in claims if claim.rival is None)
    ]
    for rival in dict.fromkeys(claim.rival for claim in claims if claim.rival):
        against = [claim for claim in claims if claim.rival == rival]
        row = f'better than "{method_title(rival)}" within the same memory?'
        rows.append([row, *(_by_verdict(against, task) for task in results.tasks)])
    return markdown_table(["this package:", *results.tasks], rows) if rows else ""


def _one(claims: Sequence[Claim], text: str, task: str) -> str:
    for claim in claims:
        if claim.effect is not None and (claim.text, claim.task) == (text, task):
            value = claim.effect.value
            text = share(value) if claim.figure == "share of the gap" else signed(value)
            where = " from the mark, no gap with some seed" if claim.figure == "loss above the mark" else ""
            return f"{claim.verdict} ({text}{where})"
    return MISSING


def _by_verdict(claims: Sequence[Claim], task: str) -> str:
    parts = []
    for verdict in ("yes", "not shown", "no"):
        found = [budget_title(claim.budget) for claim in claims if (claim.task, claim.verdict) == (task, verdict)]
        if found:
            parts.append(f"{verdict}: {', '.join(found)}")
    return "; ".join(parts) or MISSING
