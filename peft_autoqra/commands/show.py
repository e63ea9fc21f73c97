"""``autoqra show``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from peft_autoqra.colours import BITS
from peft_autoqra.commands.folder_parsers import show_parser
from peft_autoqra.commands.heat_map import HeatCell, heat_map, make_console, render
from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.tables import memory_data, memory_table, text_table
from peft_autoqra.plan import DENSE_BITS, SUPPORTED_BITS, BitRankPlan, LayerPlan
from peft_autoqra.plan_source import FoundPlan, find_plan
from peft_autoqra.plan_table import TYPE_HEADER, rows_by_type
from peft_autoqra.units import format_bytes

_INK_ON = {bits: "#1b1f24" if bits <= 4 else "#ffffff" for bits in SUPPORTED_BITS}
_DENSE_BYTES = 2
_NOTE = ", without metadata"  # of the average in model cards


def run(argv: Sequence[str]) -> Outcome:
    """Read a plan and draw it.

    Raises:
        AutoQRAError: there is no plan, it is damaged, or the hub refuses or cannot be reached.
    """
    options = show_parser().parse_args(argv)
    found = find_plan(options.plan)
    return Outcome(show_text(found, make_console(options.color)), show_data(found))


def show_text(found: FoundPlan, console: Console) -> str:
    """The plan as people read it.

    Args:
        found: the plan.
        console: gives width and colours.
    """
    plan = found.plan
    grid = heat_map(list(plan), lambda name: plan_cell(plan, plan[name]), console.width)
    title = "bits" if _has_no_adapters(plan) else "bits/rank"
    legend = Text(f"{title} of every module  ") + Text(" ").join(
        Text(f" {bits} ", style=_style(bits)) for bits in sorted({layer.bits for layer in plan.values()})
    )
    picture = [legend, "", grid] if grid is not None else [text_table(TYPE_HEADER, rows_by_type(plan))]
    return render(console, *_facts(found, console.width), "", *picture, "", _memory_text(plan, console.width))


def plan_cell(plan: Mapping[str, LayerPlan], layer: LayerPlan) -> HeatCell:
    """Bits and rank, on the colour of the bits."""
    text = f"{layer.bits}" if _has_no_adapters(plan) else f"{layer.bits}/{layer.rank}"
    return HeatCell(text, _style(layer.bits))


def show_data(found: FoundPlan) -> dict[str, Any]:
    """The same for programs."""
    return plan_data(found) | {
        "provenance": found.plan.provenance,
        "modules": {
            name: {**asdict(layer), "shape": list(found.plan.shapes[name]) if name in found.plan.shapes else None}
            for name, layer in found.plan.items()
        },
    }


def plan_data(found: FoundPlan) -> dict[str, Any]:
    """The plan without its modules."""
    plan = found.plan
    return {
        "place": found.place,
        "kind": found.kind,
        "base_model": asdict(plan.base_model),
        "quantizer": asdict(plan.quantizer),
        "initialization": plan.initialization,
        "num_modules": len(plan),
        "average_bits": plan.average_bits,
        "average_rank": plan.average_rank,
        "memory": memory_data(plan.memory),
    }


def _style(bits: int) -> str:
    return f"{_INK_ON[bits]} on {BITS[bits]}"


def _has_no_adapters(plan: Mapping[str, LayerPlan]) -> bool:
    return not any(layer.rank for layer in plan.values())


def _facts(found: FoundPlan, width: int) -> list[str]:
    base = found.plan.base_model
    figures = {name.removesuffix(_NOTE): value for name, value in found.plan.to_card().figures()}
    figures.pop("base weights", None)  # a sentence for model cards
    name = base.name_or_path or "not recorded"
    rows = {
        found.kind: found.place,
        "base model": f"{name} at {base.revision}" if base.revision else name,
        **({"base weights": f"fingerprint {base.fingerprint}"} if base.fingerprint else {}),
        **figures,
        **({} if _has_no_adapters(found.plan) else {"adapters start at": _START[found.plan.initialization]}),
    }
    left = max(map(len, rows)) + 2
    return [_wrapped(name.ljust(left), _printable(value), width) for name, value in rows.items()]


def _wrapped(title: str, value: str, width: int) -> str:
    """Broken between words, so that paths can be copied."""
    return textwrap.fill(
        value,
        width,
        initial_indent=title,
        subsequent_indent=" " * len(title),
        break_long_words=False,
        break_on_hyphens=False,
    )


_START = {"compensate": "the calibrated correction of the quantization error", "zero": "zero"}


def _printable(text: str) -> str:
    """A plan from elsewhere must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _memory_text(plan: BitRankPlan, width: int) -> str:
    if plan.memory is not None:
        return memory_table({"bytes": plan.memory}, exact=True) + "\nActivations are not counted."
    sizes = _layer_bytes(plan)
    if sizes is None:
        return textwrap.fill(
            "The plan does not know the shapes of its weights, so their bytes cannot be counted.", width
        )
    codes, metadata = sizes
    text = (
        f"The planned layers take {format_bytes(codes)} and {format_bytes(metadata)} of quantization metadata; at 16 "
        f"bits {format_bytes(sum(map(math.prod, plan.shapes.values())) * _DENSE_BYTES)}. All else is not recorded."
    )
    return textwrap.fill(text, width)


def _layer_bytes(plan: BitRankPlan) -> tuple[int, int] | None:
    """Of weights and metadata; None where shapes are not known."""
    if len(plan.shapes) < len(plan):
        return None
    # Imports torch, which takes seconds; plans that a search made know their bytes.
    from peft_autoqra.quant.backends import make_backend  # noqa: PLC0415

    backend = make_backend(plan.quantizer)
    codes = metadata = 0
    for name, layer in plan.items():
        if layer.bits == DENSE_BITS:
            codes += math.prod(plan.shapes[name]) * _DENSE_BYTES
        else:
            of_codes, of_metadata = backend.num_bytes(*plan.shapes[name], layer.bits, name)
            codes, metadata = codes + of_codes, metadata + of_metadata
    return codes, metadata
