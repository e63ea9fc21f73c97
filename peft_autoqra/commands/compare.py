"""``autoqra compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from peft_autoqra.commands.folder_parsers import compare_parser
from peft_autoqra.commands.heat_map import HeatCell, heat_map, make_console, render
from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.show import plan_data
from peft_autoqra.commands.tables import MEMORY_PARTS, text_table
from peft_autoqra.plan import LayerPlan
from peft_autoqra.plan_differences import ModuleDifference, PlanDifferences
from peft_autoqra.plan_source import FoundPlan, find_plan

_MOST_MODULES = 10
_FEWER, _MORE = "#1b1f24 on #f0b27a", "#1b1f24 on #9fc5ec"  # told apart with every kind of colour blindness


def run(argv: Sequence[str]) -> Outcome:
    """Read two plans and tell their differences.

    Raises:
        AutoQRAError: a plan is missing or damaged, they are for different models, or the hub cannot be reached.
    """
    options = compare_parser().parse_args(argv)
    first, second = find_plan(options.first), find_plan(options.second)
    differences = PlanDifferences.of(first.plan, second.plan)
    text = compare_text(first, second, differences, make_console(options.color))
    return Outcome(text, compare_data(first, second, differences))


def compare_text(first: FoundPlan, second: FoundPlan, differences: PlanDifferences, console: Console) -> str:
    """The differences as people read them.

    Args:
        first: A.
        second: B.
        differences: between them.
        console: gives width and colours.
    """
    parts = [f"A  {first.place} ({first.kind})", f"B  {second.place} ({second.kind})", ""]
    parts += [_figures_table(first, second), "", *_remarks(differences), ""]
    changed = differences.changed
    if not changed:
        return render(console, *parts, _verdict(differences)).rstrip()
    parts += [_verdict(differences), f"bits  {_histogram(differences.bits_changes())}"]
    parts += [f"rank  {_histogram(differences.rank_changes())}", ""]
    by_name = {module.name: module for module in differences.modules}
    grid = heat_map(list(by_name), lambda name: difference_cell(by_name[name]), console.width)
    if grid is not None:
        return render(
            console, *parts, "B - A, bits/rank; a dot is no difference", "", grid, "", _largest(changed)
        ).rstrip()
    return render(console, *parts, _largest(changed)).rstrip()


def difference_cell(module: ModuleDifference) -> HeatCell:
    """Signed differences; the colour says whether bits, or where they are the same ranks, are more or fewer."""
    if module.is_same:
        return HeatCell(".")
    return HeatCell(f"{module.bits:+d}/{module.rank:+d}", _MORE if (module.bits or module.rank) > 0 else _FEWER)


def compare_data(first: FoundPlan, second: FoundPlan, differences: PlanDifferences) -> dict[str, Any]:
    """The same for programs."""
    return {
        "first": plan_data(first),
        "second": plan_data(second),
        "same": differences.are_same,
        "same_base_weights": not differences.other_weights,
        "bits_changes": _changes_data(differences.bits_changes()),
        "rank_changes": _changes_data(differences.rank_changes()),
        "changed_modules": [
            {
                "name": module.name,
                "first": asdict(module.first),
                "second": asdict(module.second),
                "weight_bytes": module.weight_bytes,
                "adapter_parameters": module.adapter_parameters,
            }
            for module in differences.changed
        ],
        "only_in_first": list(differences.only_first),
        "only_in_second": list(differences.only_second),
    }


def _changes_data(changes: Mapping[tuple[int, int], int]) -> list[dict[str, int]]:
    return [{"first": old, "second": new, "num_modules": number} for (old, new), number in changes.items()]


def _figures_table(first: FoundPlan, second: FoundPlan) -> str:
    one, other = first.plan, second.plan
    rows = [
        ["modules", f"{len(one):,}", f"{len(other):,}", f"{len(other) - len(one):+,}"],
        _float_row("average bits", one.average_bits, other.average_bits),
        _float_row("average rank", one.average_rank, other.average_rank),
    ]
    if one.memory is not None and other.memory is not None:
        parts = {**MEMORY_PARTS, "stored_bytes": "stored", "total_bytes": "training"}
        for name, title in parts.items():
            old, new = getattr(one.memory, name), getattr(other.memory, name)
            rows.append([f"{title}, bytes", f"{old:,}", f"{new:,}", f"{new - old:+,}"])
    return text_table(["", "A", "B", "B - A"], rows)


def _float_row(title: str, old: float, new: float) -> list[str]:
    return [title, f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f}"]


def _remarks(differences: PlanDifferences) -> list[str]:
    first, second = differences.first, differences.second
    remarks = []
    if first.memory is None or second.memory is None:
        remarks.append("Bytes by part are not recorded in both plans.")
    if differences.other_weights:
        remarks.append("The plans were made for different weights of the same shapes (fingerprints differ).")
    if first.quantizer != second.quantizer:
        remarks.append(
            f"Quantizers differ: {_settings(asdict(first.quantizer))}; {_settings(asdict(second.quantizer))}."
        )
    if first.initialization != second.initialization:
        remarks.append(f"Adapters start differently: {first.initialization}; {second.initialization}.")
    for letter, names in (("A", differences.only_first), ("B", differences.only_second)):
        if names:
            remarks.append(f"Only {letter} plans {len(names)} modules, such as {names[0]}.")
    return remarks or ["Same quantizer, same start of the adapters, same modules."]


def _settings(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _verdict(differences: PlanDifferences) -> str:
    num_changed, num = len(differences.changed), len(differences.modules)
    if not num_changed:
        return f"All {num} modules of both have the same bits and ranks."
    return f"{num_changed} of {num} modules of both differ."


def _histogram(changes: Mapping[tuple[int, int], int]) -> str:
    same = sum(number for (old, new), number in changes.items() if old == new)
    parts = [f"{old} to {new}: {number}" for (old, new), number in changes.items() if old != new]
    return ", ".join([*parts, f"same: {same}"])


def _largest(changed: Sequence[ModuleDifference]) -> str:
    rows = [
        [
            module.name,
            _cell(module.first),
            _cell(module.second),
            _signed(module.weight_bytes),
            _signed(module.adapter_parameters),
        ]
        for module in changed[:_MOST_MODULES]
    ]
    table = text_table(["differ most (bits/rank)", "A", "B", "weight bytes", "adapter parameters"], rows)
    left = len(changed) - len(rows)
    return f"{table}\n{left} more; --json lists all." if left else table


def _cell(layer: LayerPlan) -> str:
    return f"{layer.bits}/{layer.rank}"


def _signed(value: int | None) -> str:
    return "-" if value is None else f"{value:+,}"
