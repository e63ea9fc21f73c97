"""Pieces of HTML that a report is put together from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from peft_autoqra.report_style import STYLE
from peft_autoqra.report_tables import Column, Table


def page(title: str, heading: str, sections: Sequence[str]) -> str:
    """A whole page, which its own policy forbids to load anything.

    Args:
        title: plain text.
        heading: HTML below the title.
        sections: from :func:`section`.
    """
    titles = [re.search(r"<h2 id=\"(.*?)\">(.*?)</h2>", section) for section in sections]
    links = "".join(f'<li><a href="#{found[1]}">{found[2]}</a></li>' for found in titles if found)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<header><h1>{escape(title)}</h1>{heading}"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n<main>\n'
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of the page; nothing without a body."""
    name = re.sub(r"[^a-z]+", "-", title.lower())
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>' if body else ""


def figure(svg: str, title: str, caption: str) -> str:
    """A figure that scrolls by itself where the screen is narrower."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{_scrolling(svg, title)}</figure>"


def html_table(table: Table) -> str:
    """A table; words to the left, numbers to the right."""
    header = "".join(f'<th scope="col"{_alignment(column)}>{escape(column.title)}</th>' for column in table.columns)
    rows = "".join(f"<tr>{_cells(table, row)}</tr>" for row in table.shown_rows)
    content = f"<thead><tr>{header}</tr></thead><tbody>{rows}</tbody>"
    return _scrolling(f"<table><caption>{escape(table.caption)}</caption>{content}</table>", table.caption)


def facts_list(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values, side by side."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f"<dl class='facts'>{items}</dl>"


def details(title: str, body: str) -> str:
    """Hidden until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def code_block(lines: Sequence[str]) -> str:
    """Preformatted lines."""
    return f'<pre tabindex="0"><code>{escape(chr(10).join(lines))}</code></pre>'


def _scrolling(content: str, title: str) -> str:
    """Can be scrolled with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{content}</div>'


def _cells(table: Table, row: Sequence[str]) -> str:
    first, *others = zip(table.columns, row, strict=True)
    return f'<th scope="row"{_alignment(first[0])}>{escape(first[1])}</th>' + "".join(
        f"<td{_alignment(column)}>{escape(text)}</td>" for column, text in others
    )


def _alignment(column: Column) -> str:
    return ' class="number"' if column.is_number else ""
