"""Text of strangers in Markdown."""

from __future__ import annotations

import pytest

from peft_autoqra.markdown import escaped, inline_code, markdown_table
from peft_autoqra.readme import END


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", "q_proj"),
        ("x|y", r"x\|y"),
        ("\\|", r"\\\|"),
        ("a\nb\r\u2028c\x00", "a b  c "),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("&lt;", "&amp;lt;"),
        ("![x](y.png)", r"!\[x](y.png)"),
        ("`*x*`", r"\`\*x\*\`"),
    ],
)
def test_what_is_escaped(text, expected):
    assert escaped(text) == expected
    assert markdown_table(("a",), [(text,)]) == f"| a |\n| --- |\n| {expected} |"
    assert markdown_table((text,), []) == f"| {expected} |\n| --- |"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/base", "`me/base`"),
        ("C:\\models\\*", "`C:\\models\\*`"),
        ("a`b", r"a\`b"),
        (END, END.replace("<", "&lt;").replace(">", "&gt;")),
        ("a\nb", "a b"),
    ],
)
def test_names_as_code(text, expected):
    assert inline_code(text) == expected
