"""The API reference that ``make docs`` builds."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

import peft_autoqra
from peft_autoqra import errors

SCRIPT = Path(__file__).parent.parent / "scripts" / "build_api_docs.py"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages. A warning of pdoc would be an error here."""
    directory = tmp_path_factory.mktemp("api")
    runpy.run_path(str(SCRIPT))["build"](directory)
    return directory


def described(page: Path) -> set[str]:
    """Names with an entry that says something."""
    entries = re.findall(r'id="([\w.]+)"((?:(?!id=").)*)', page.read_text(), re.DOTALL)
    return {name for name, text in entries if '<div class="docstring">' in text}


def test_every_public_name_is_described(reference: Path) -> None:
    names = described(reference / "peft_autoqra.html")
    assert set(peft_autoqra.__all__) - names == set()
    assert {f"BitRankPlan.{name}" for name in ("save_pretrained", "from_pretrained", "push_to_hub")} <= names


def test_every_error_is_described(reference: Path) -> None:
    names = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert names <= described(reference / "peft_autoqra" / "errors.html")


def test_what_guides_name_by_its_module_is_described(reference: Path) -> None:
    pages = [SCRIPT.parent.parent / "README.md", *(SCRIPT.parent.parent / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    imports = re.findall(r"^from peft_autoqra\.([\w.]+) import (\w+)", text, re.MULTILINE)
    named = re.findall(r"`peft_autoqra\.([a-z_.]+)\.([A-Z]\w+|\w+(?=\())", text)
    assert len(imports) + len(named) >= 5
    for module, name in [*imports, *named]:
        page = reference / "peft_autoqra" / f"{module.replace('.', '/')}.html"
        assert name in described(page), f"{module}.{name}"


def test_examples_and_references_are_rendered(reference: Path) -> None:
    page = (reference / "peft_autoqra.html").read_text()
    assert page.count('<div class="pdoc-code codehilite">') >= 5
    assert "```" not in page
    assert not re.search(r":(class|func|meth|mod):|~peft_autoqra", page)


def test_links_between_pages_lead_somewhere(reference: Path) -> None:
    for page in reference.rglob("*.html"):
        links = re.findall(r'href="([^"#:]+\.html)', page.read_text())
        assert links or page.name == "index.html"
        assert [link for link in links if not (page.parent / link).exists()] == []
