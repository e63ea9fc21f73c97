"""What the benchmark was made to show, and whether its records show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.finetune.cell_runs import CellRuns
from benchmarks.finetune.comparison import Effect, gap_closed, loss_above_mark, loss_difference
from benchmarks.finetune.config import Config
from benchmarks.finetune.grid import Cell
from benchmarks.finetune.records import Record
from benchmarks.finetune.titles import base_name, budget_order, budget_title, method_title

BASELINE, UNQUANTIZED, OURS = "qlora-r16", "lora-r16", "autoqra"
FULL_BUDGET, LESS_BUDGET = "qlora-4bit-r16", "0.75*qlora-4bit-r16"
RIVALS = ("sequential", "published", "uniform", "autoround", "autoqra-allocation")
SHARE = 0.8
MIN_SEEDS = 2  # with one, nothing is known about others

Verdict = Literal["yes", "no", "not shown"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim on one task.

    Attributes:
        text: the same on all tasks.
        task: name.
        budget: of the claim.
        figure: what ``effect`` is.
        effect: the figure; None where it has not been run.
        is_reached: whether the median over seeds reaches it; None without a run.
        verdict: "yes" and "no" where the 95% interval leaves no other answer, there is more than one seed, and none
            diverged.
        rival: method that ours is compared with at the same budget; None for QLoRA.
    """

    text: str
    task: str
    budget: str
    figure: Literal["share of the gap", "loss above the mark", "loss difference"]
    effect: Effect | None
    is_reached: bool | None
    verdict: Verdict
    rival: str | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryCheck:
    """What was foretold of memory, against the tensors.

    Attributes:
        num_runs: completed.
        num_exact: runs with the foretold bytes, part by part.
        num_limited: runs within a budget.
        num_kept: of these, runs that kept it.
        largest_difference: bytes of a part, measured minus predicted.
        part: the one; empty where all is exact.
    """

    num_runs: int
    num_exact: int
    num_limited: int
    num_kept: int
    largest_difference: int
    part: str


def contenders(config: Config, method: str) -> list[str]:
    """A method as the configuration names it, once for every cost: that is part of a search's name."""
    names = dict.fromkeys(name for group in config.groups for name in group.methods)
    return [name for name in names if base_name(name) == method] or [method]


def all_claims(config: Config, cells: Mapping[Cell, CellRuns], tasks: Iterable[str]) -> list[Claim]:
    """Of all tasks, claim by claim; ours as it is named first, with rivals at every cost and budget that was run."""
    tasks, ours = list(tasks), contenders(config, OURS)[0]
    claims = [_gap_claim(cells, ours, task) for task in tasks]
    claims += [_less_memory_claim(cells, ours, task) for task in tasks]
    for theirs in (name for rival in RIVALS for name in contenders(config, rival)):
        for budget in _common_budgets(cells, ours, theirs):
            claims += [_rival_claim(cells, task, (ours, theirs), budget) for task in tasks]
    return claims


def check_memory(records: Iterable[Record]) -> MemoryCheck:
    """Over completed runs."""
    memories = [record.memory for record in records if record.memory is not None]
    limited = [memory for memory in memories if memory.budget_bytes is not None]
    parts = [
        (getattr(memory.measured, part) - predicted, part)
        for memory in memories
        for part, predicted in memory.predicted.to_dict().items()
    ]
    difference, part = max(parts, key=lambda item: abs(item[0]), default=(0, ""))
    return MemoryCheck(
        num_runs=len(memories),
        num_exact=sum(memory.predicted == memory.measured for memory in memories),
        num_limited=len(limited),
        num_kept=sum(memory.is_kept for memory in limited),
        largest_difference=difference,
        part=part.removesuffix("_bytes") if difference else "",
    )


def _gap_claim(cells: Mapping[Cell, CellRuns], ours: str, task: str) -> Claim:
    """Where a seed shows no gap there is no share of it, but still a loss at which it would be closed."""
    found = _runs(cells, (task, ours, FULL_BUDGET), (task, BASELINE, None), (task, UNQUANTIZED, None))
    closed = gap_closed(*found) if found else None
    mark = loss_above_mark(*found, share=SHARE) if found else None
    return Claim(
        text=f"closes at least {SHARE:.0%} of the gap between QLoRA r=16 and 16-bit LoRA, at QLoRA's memory",
        task=task,
        budget=FULL_BUDGET,
        figure="share of the gap" if closed or not mark else "loss above the mark",
        effect=closed or mark,
        is_reached=None if mark is None else mark.value <= 0,
        verdict=_verdict(mark, found),
    )


def _less_memory_claim(cells: Mapping[Cell, CellRuns], ours: str, task: str) -> Claim:
    found = _runs(cells, (task, ours, LESS_BUDGET), (task, BASELINE, None))
    effect = loss_difference(*found) if found else None
    return Claim(
        text="no worse than QLoRA r=16, at 75% of its memory",
        task=task,
        budget=LESS_BUDGET,
        figure="loss difference",
        effect=effect,
        is_reached=None if effect is None else effect.value <= 0,
        verdict=_verdict(effect, found),
    )


def _rival_claim(cells: Mapping[Cell, CellRuns], task: str, methods: tuple[str, str], budget: str) -> Claim:
    ours, rival = methods
    found = _runs(cells, (task, ours, budget), (task, rival, budget))
    effect = loss_difference(*found) if found else None
    return Claim(
        text=f'better than "{method_title(rival)}" within the same memory ({budget_title(budget)})',
        task=task,
        budget=budget,
        figure="loss difference",
        effect=effect,
        is_reached=None if effect is None else effect.value < 0,
        verdict=_verdict(effect, found),
        rival=rival,
    )


def _verdict(excess: Effect | None, compared: Iterable[CellRuns] | None) -> Verdict:
    """Of a difference that should not be above 0; runs that diverged are not in it, and would change it."""
    if excess is None or excess.num_seeds < MIN_SEEDS or any(runs.lost_seeds for runs in compared or ()):
        return "not shown"
    low, high = excess.interval
    return "yes" if high < 0 else "no" if low > 0 else "not shown"


def _runs(cells: Mapping[Cell, CellRuns], *wanted: Cell) -> tuple[CellRuns, ...] | None:
    """None where one was not run, or none of its runs was completed."""
    found = tuple(cells[cell] for cell in wanted if cell in cells and cells[cell].runs)
    return found if len(found) == len(wanted) else None


def _common_budgets(cells: Mapping[Cell, CellRuns], *methods: str) -> list[str]:
    known = ({budget for _, name, budget in cells if name == method and budget} for method in methods)
    return sorted(set.intersection(*known), key=budget_order)
