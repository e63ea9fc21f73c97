"""Methods, budgets and tasks as people read them."""

from __future__ import annotations

import re

from benchmarks.finetune.budget import QLORA, STORED_PREFIX

METHODS = {
    "lora-r16": "LoRA r=16, 16 bits",
    "qlora-r4": "QLoRA r=4",
    "qlora-r8": "QLoRA r=8",
    "qlora-r16": "QLoRA r=16",
    "qlora-r16-bf16": "QLoRA r=16, bfloat16 adapters",
    "qlora-r64": "QLoRA r=64",
    "qlora-rslora-r64": "QLoRA with rsLoRA r=64",
    "qlora-loftq-r16": "LoftQ r=16 on NF4",
    "qlora-adalora": "AdaLoRA on NF4",
    "qlora-eva-r16": "EVA r=16 on NF4",
    "uniform-like-zero": "same bits and rank, no data",
    "uniform-like": "same bits and rank, calibrated",
    "uniform-zero": "uniform, no data",
    "uniform": "uniform, calibrated",
    "sequential": "sequential: one rank, then bits",
    "autoround": "AutoRound's bits, one rank",
    "published": "AutoQRA as published",
    "autoqra-allocation": "this package, allocation alone",
    "autoqra-allocation-gptq": "this package, allocation alone, gptq",
    "autoqra": "this package",
    "autoqra-gptq": "this package, gptq",
}
"""In the order of the tables: without a budget, what others do within one, ours."""

_COST = re.compile(r"-cost(?P<cost>[\d.]+)$")


def base_name(method: str) -> str:
    """Without ``"-cost3"``, which says what a search may cost, in full fine-tunes."""
    return _COST.sub("", method)


def method_title(name: str) -> str:
    """Of a method."""
    cost = _COST.search(name)
    title = METHODS.get(base_name(name), base_name(name))
    return f"{title}, cost {cost['cost']}" if cost else title


def budget_title(budget: str) -> str:
    """Short, as ``"4-bit QLoRA"``, ``"75% of 4-bit QLoRA"``; of rank 16 where no rank is named."""
    text = budget.removeprefix(STORED_PREFIX)
    if found := QLORA.fullmatch(text):
        text = f"{found['bits']}-bit QLoRA" + ("" if found["rank"] == "16" else f" r={found['rank']}")
        text = f"{float(found['factor']):.0%} of {text}" if found["factor"] else text
    return f"stored {text}" if budget.startswith(STORED_PREFIX) else text


def cell_title(method: str, budget: str | None) -> str:
    """Method and budget."""
    return method_title(method) if budget is None else f"{method_title(method)}, within {budget_title(budget)}"


def method_order(name: str) -> tuple[int, str]:
    """To sort methods by."""
    known = list(METHODS)
    base = base_name(name)
    return (known.index(base) if base in known else len(known)), name


def budget_order(budget: str | None) -> tuple[int, float, str]:
    """To sort budgets by: none, then training memory from the largest, then stored; sizes that are not known last."""
    if budget is None:
        return 0, 0.0, ""
    found = QLORA.fullmatch(budget.removeprefix(STORED_PREFIX))
    bits = float(found["bits"]) * float(found["factor"] or 1) if found else 0.0
    return (2 if budget.startswith(STORED_PREFIX) else 1), -bits, budget
