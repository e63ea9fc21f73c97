"""The colours of figures: what each is for, on light and on dark ground."""

from __future__ import annotations

import re

PAGE, INK, SOFT, LINE = "#ffffff", "#1b1f24", "#59636e", "#d9dee4"

# One hue from light to dark, so that lightness alone tells the bits apart.
BITS = {2: "#d3e4f6", 3: "#9fc5ec", 4: "#609dd9", 8: "#2b6cb0", 16: "#143f70"}
DOT, DOT_EDGE, CELL_EDGE = "#fffffe", "#1b1f25", "#8fa3b8"

# After Okabe and Ito, "Color Universal Design" (2008), darker where their tones are faint on white.
STAGES = {
    "baseline": "#5f6874",
    "allocation": "#0072b2",
    "evolution": "#c04e00",
    "trust_region": "#00805e",
    "confirmation": "#a0438a",
}

PARTS = {
    "weight_bytes": "#2b6cb1",
    "metadata_bytes": "#8db8e6",
    "untouched_bytes": "#a3adb8",
    "adapter_bytes": "#b9520b",
    "gradient_bytes": "#e8955a",
    "optimizer_bytes": "#f3c9a5",
}
"""Blue is frozen, orange is trained."""

PART_LABELS = {
    "weight_bytes": "#fefefe",
    "metadata_bytes": "#1b1f26",
    "untouched_bytes": "#1b1f27",
    "adapter_bytes": "#fefeff",
    "gradient_bytes": "#1b1f28",
    "optimizer_bytes": "#1b1f29",
}
"""Of text on the parts."""

_DARK = {
    PAGE: "#14171b",
    INK: "#e6e9ed",
    SOFT: "#a2abb5",
    LINE: "#333a42",
    BITS[2]: "#1c3450",
    BITS[3]: "#27507e",
    BITS[4]: "#3474b6",
    BITS[8]: "#6aa6e0",
    BITS[16]: "#c1dcf6",
    DOT: "#ffffff",
    DOT_EDGE: "#0b0d10",
    CELL_EDGE: "#45566a",
    STAGES["baseline"]: "#9aa4af",
    STAGES["allocation"]: "#62aef0",
    STAGES["evolution"]: "#f08a4b",
    STAGES["trust_region"]: "#3cc79a",
    STAGES["confirmation"]: "#dc8fca",
    PARTS["weight_bytes"]: "#4a90d9",
    PARTS["metadata_bytes"]: "#27507f",
    PARTS["untouched_bytes"]: "#5d6772",
    PARTS["adapter_bytes"]: "#f08a4c",
    PARTS["gradient_bytes"]: "#a65a2b",
    PARTS["optimizer_bytes"]: "#6d3d20",
    PART_LABELS["weight_bytes"]: "#0b0d11",
    PART_LABELS["metadata_bytes"]: "#e6e9ee",
    PART_LABELS["untouched_bytes"]: "#ffffff",
    PART_LABELS["adapter_bytes"]: "#0b0d12",
    PART_LABELS["gradient_bytes"]: "#ffffff",
    PART_LABELS["optimizer_bytes"]: "#e6e9ef",
}


def stylesheet() -> str:
    """Every colour as a variable of CSS that follows the reader's setting."""
    light = ";".join(f"{_variable(colour)}:{colour}" for colour in _DARK)
    dark = ";".join(f"{_variable(colour)}:{other}" for colour, other in _DARK.items())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def reference(colour: str) -> str:
    """A colour as style sheets name it."""
    return f"var({_variable(colour)})"


def with_references(style: str) -> str:
    """A piece of CSS with every colour replaced by its variable."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: reference(match[0]) if match[0] in _DARK else match[0], style)


def _variable(colour: str) -> str:
    return f"--c-{colour.removeprefix('#')}"
