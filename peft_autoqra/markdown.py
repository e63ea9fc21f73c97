"""Text of strangers in Markdown: it stays text, whatever it holds."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """One line that shows the text as it is: no markup, no HTML, no cell of a table ends in it."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*\[|])", r"\\\1", html.escape(line, quote=False))


def inline_code(text: str) -> str:
    """A name as code; as plain text where it could end the code, or hold an HTML comment that others search for."""
    return f"`{text}`" if text.isprintable() and not {"`", "<"} & set(text) else escaped(text)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        header: title of each column.
        rows: cells of each row; plain text.
    """
    lines = [[escaped(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
