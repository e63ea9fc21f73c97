"""Bytes and seconds as people read them."""

from __future__ import annotations

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_bytes(num_bytes: int | float) -> str:
    """Three or four significant digits in decimal units, such as ``"183.4 MB"``; below 1,000 bytes exactly."""
    value = float(num_bytes)
    for unit in _BYTE_UNITS:
        if abs(value) < 999.95 or unit == _BYTE_UNITS[-1]:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {_BYTE_UNITS[-1]}"


def format_seconds(num_seconds: float) -> str:
    """Two units at most, such as ``"42 s"``, ``"3 min 20 s"`` or ``"2 h 5 min"``."""
    if num_seconds < 10:
        return f"{num_seconds:.1f} s"
    minutes, seconds = divmod(round(num_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_signed(value: float) -> str:
    """Four decimals with a sign, such as ``"+0.0149"``; none for what rounds to zero."""
    return "0.0000" if abs(value) < 5e-5 else f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")
