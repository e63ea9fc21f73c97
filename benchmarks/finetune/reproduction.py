"""What was run here beside what the repository has on record."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.finetune.records import Record, Run


def reproduction_lines(here: Sequence[Record], recorded: Sequence[Record]) -> list[str]:
    """A Markdown table of the runs that both have: the same model, task, recipe, method, budget, rate and seed.

    Args:
        here: records of this machine.
        recorded: records of the repository.

    Returns:
        Nothing where there is no such run.
    """
    known = {_identity(record): record for record in recorded}
    pairs = [(record, known[_identity(record)]) for record in here if _identity(record) in known]
    rows = [
        f"| {mine.run.task} | {mine.run.method} | {mine.run.budget or ''} | {mine.test.loss:.4f} | "
        f"{theirs.test.loss:.4f} | {mine.test.loss - theirs.test.loss:+.4f} |"
        for mine, theirs in pairs
        if mine.test is not None and theirs.test is not None
    ]
    head = ["| task | method | budget | test loss here | recorded | difference |", "|---|---|---|---|---|---|"]
    return head + rows if rows else []


def _identity(record: Record) -> tuple[str, str, str, str | None, float, int]:
    run: Run = record.run
    return record.digest, run.task, run.method, run.budget, run.learning_rate, run.seed
