"""The bits and the rank that a budget names: what stands for QLoRA at bit-widths that bitsandbytes does not have."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finetune.budget import STORED_PREFIX
from benchmarks.finetune.method import NotApplicable, Spent
from benchmarks.finetune.search_of import Calibrated, save_without_data, searcher_of
from benchmarks.finetune.setting import Setting
from peft_autoqra import LayerPlan
from peft_autoqra.granularity import build_search_space
from peft_autoqra.quant.packing import NATIVE_BITS
from peft_autoqra.search_setup import SearchSetup


@dataclass(frozen=True)
class UniformLike:
    """K bits and rank R at a budget of ``"qlora-Kbit-rR"``; half bits alternate from layer to layer.

    Such a budget counts the scales of NF4 (0.13 bits a weight). The native format's take twice that, which is made up
    for by the rank: it is the largest up to R that keeps the budget, and the plan's record tells both.

    Attributes:
        calibrated: as :class:`~benchmarks.finetune.methods.uniform.Uniform` has it.
    """

    calibrated: bool = True

    @property
    def name(self) -> str:
        """``"uniform-like"`` or ``"uniform-like-zero"``."""
        return "uniform-like" if self.calibrated else "uniform-like-zero"

    def allocate(self, setting: Setting, budget: str, folder: Path) -> Spent:
        """Write the plan.

        Raises:
            NotApplicable: the budget names no bits and rank, or bits without a format, or has no room for any rank.
        """
        bits, rank = bits_and_rank(budget)
        searcher = searcher_of(setting, budget, folder, bit_choices=sorted(set(bits)))
        setup, start = searcher.setup, time.perf_counter()
        layers = _largest_rank(setup, bits, rank, budget)
        record = {"wanted_rank": rank, "rank": max(layer.rank for layer in layers.values())}
        if not self.calibrated:
            save_without_data(setup, layers, folder, self.name, **record)
            return Spent(seconds=time.perf_counter() - start)
        calibrated = Calibrated.of(searcher)
        start = time.perf_counter()
        calibrated.save(layers, folder, self.name, **record)
        return Spent(seconds=calibrated.seconds + time.perf_counter() - start, cost=setup.costs.calibration)


def bits_and_rank(budget: str) -> tuple[tuple[int, ...], int]:
    """The bits of successive layers, in turns, and the rank that a budget names.

    Raises:
        NotApplicable: it names none, or bits that the native format does not have.
    """
    found = re.fullmatch(r"qlora-(\d+)(\.5)?bit-r(\d+)", budget.removeprefix(STORED_PREFIX))
    if not found:
        raise NotApplicable(f"The budget {budget} names no whole or half bits and rank, as qlora-2.5bit-r16 does.")
    low = int(found[1])
    bits = (low, low + 1) if found[2] else (low,)
    if not set(bits) <= set(NATIVE_BITS):
        raise NotApplicable(f"The native format has {NATIVE_BITS} bits, not all of {bits}, which {budget} takes.")
    return bits, int(found[3])


def _largest_rank(setup: SearchSetup, bits: tuple[int, ...], rank: int, budget: str) -> Mapping[str, LayerPlan]:
    for smaller in range(rank, 0, -1):
        layers = _alternating(setup, bits, smaller)
        estimate = setup.memory_model.estimate(layers, setup.quantizer)
        if estimate.in_scope(setup.budget.scope) <= setup.budget.limit_bytes:
            return layers
    raise NotApplicable(f"{budget} leaves no room for an adapter at {bits} bits of the native format.")


def _alternating(setup: SearchSetup, bits: tuple[int, ...], rank: int) -> dict[str, LayerPlan]:
    modules = setup.memory_model.modules
    groups = build_search_space(modules, "layer", bits, [rank]).groups
    uniform = {each: setup.memory_model.uniform(each, rank) for each in bits}
    bits_of = {name: bits[index % len(bits)] for index, group in enumerate(groups) for name in group.modules}
    return {name: uniform[bits_of[name]][name] for name in modules}
