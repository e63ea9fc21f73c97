"""Budgets as the benchmark writes them."""

from __future__ import annotations

import re

from peft_autoqra.memory import MemoryBudget, MemoryModel, resolve_budget
from peft_autoqra.memory_estimate import MemoryScope
from peft_autoqra.plan import QuantizerSettings

STORED_PREFIX = "stored:"
QLORA = re.compile(r"(?:(?P<factor>[\d.]+)\*)?qlora-(?P<bits>[\d.]+)bit-r(?P<rank>\d+)")


def limit_of(text: str, memory_model: MemoryModel) -> MemoryBudget:
    """The budget in bytes.

    ``"qlora-3bit-r16"`` is what QLoRA would take if NF4 had 3 bits: its scales, its adapters, 3/4 of its codes; bits
    may be fractions. Other texts are those of a search's ``memory_budget``. They limit what training holds;
    ``"stored:"`` in front limits what is stored.

    Raises:
        MemoryBudgetError: a text that cannot be read.
    """
    scope: MemoryScope = "stored" if text.startswith(STORED_PREFIX) else "training"
    text = text.removeprefix(STORED_PREFIX)
    if not (found := QLORA.fullmatch(text)):
        return resolve_budget(text, memory_model, scope)
    nf4 = memory_model.uniform(4, int(found["rank"]))
    num_bytes = memory_model.estimate(nf4, QuantizerSettings(backend="bitsandbytes")).in_scope(scope)
    num_bytes -= int((4 - float(found["bits"])) / 8 * memory_model.num_weights)
    return MemoryBudget(int(float(found["factor"] or 1) * num_bytes), scope)
