"""Numbers as the tables write them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.finetune.comparison import Effect

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def signed(value: float, digits: int = 3) -> str:
    """With a sign, but for what rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", _MINUS) if float(text) else text.lstrip("+-")


def plain(value: float | None, digits: int = 3) -> str:
    """Without a plus."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", _MINUS)


def share(value: float) -> str:
    """In percent."""
    return f"{value:.0%}".replace("-", _MINUS)


def interval(effect: Effect, *, as_share: bool = False) -> str:
    """``"(low to high)"``."""
    bounds = [(share if as_share else signed)(value) if math.isfinite(value) else "?" for value in effect.interval]
    return "(unbounded)" if bounds == ["?", "?"] else f"({bounds[0]} to {bounds[1]})"


def with_interval(effect: Effect | None, *, as_share: bool = False) -> str:
    """Median over seeds, then the interval."""
    if effect is None:
        return MISSING
    return f"{(share if as_share else signed)(effect.value)} {interval(effect, as_share=as_share)}"


def megabytes(num_bytes: float | None) -> str:
    """In MB, one decimal."""
    return MISSING if num_bytes is None else f"{num_bytes / 1e6:,.1f}"


def seeds_of(numbers: Iterable[int]) -> str:
    """Fewest and most, ``"3"`` or ``"1 to 3"``."""
    found = sorted(set(numbers))
    return MISSING if not found else str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
