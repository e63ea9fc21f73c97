"""Collects what the conformance suite found and keeps docs/conformance.md equal to it: a pytest plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
WORKS, REFUSED, MEANINGLESS = "works", "refused", "meaningless"
_MARKS = {WORKS: "✓", REFUSED: "refused", MEANINGLESS: "·"}
_INTRODUCTION = """\
# What works on which model

Made from the results of `tests/conformance`, which runs every row on a tiny random model of every column with the real
libraries; `make test ARGS=--write-conformance` writes it again, and a run whose results differ from this page fails.

✓ works, checked by the suite. *refused* stops with an error that gives the reason; where the refusal is this package's
own, the suite checks that it comes before the model is touched. · means nothing there. Numbers point to the reasons
below each table.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-conformance", action="store_true", help="write docs/conformance.md from the results")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that sees all reports
        config.pluginmanager.register(ConformanceTable(config), "conformance-table")


class ConformanceTable:
    """Results of the suite.

    Args:
        config: of the run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._write = config.getoption("write_conformance")
        self._cells: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
        self._expected: int | None = None
        self._message = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties).get("conformance")
        if report.when != "call" or found is None or not report.passed:
            return
        group, feature, model, outcome, reason, self._expected = found
        self._cells.setdefault((group, feature), {})[model] = (outcome, reason)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compare or write, when every cell was checked."""
        if self._expected is None or sum(map(len, self._cells.values())) != self._expected:
            return
        page = render(self._cells)
        if self._write:
            PAGE.parent.mkdir(exist_ok=True)
            PAGE.write_text(page, encoding="utf-8")
        elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self._message = (
                f"{PAGE.name} does not say what the conformance suite found: run it with --write-conformance"
            )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._message:
            terminalreporter.write_line(self._message, red=True)


def render(cells: dict[tuple[str, str], dict[str, tuple[str, str]]]) -> str:
    """The page; rows and columns in the order of their definition.

    Args:
        cells: (group, feature) to model to (outcome, reason).
    """
    from tests.conformance.models import CASES  # noqa: PLC0415 - transformers, which most test runs need later or never
    from tests.conformance.test_conformance import FEATURES  # noqa: PLC0415

    models = [case.name for case in CASES]
    sections = [_INTRODUCTION]
    for group in dict.fromkeys(feature.group for feature in FEATURES):
        names = [feature.name for feature in FEATURES if feature.group == group]
        reasons: list[str] = []
        rows = [_row(name, [cells[group, name][model] for model in models], reasons) for name in names]
        header = ["| |" + "|".join(models) + "|", "|---" * (len(models) + 1) + "|"]
        notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
        sections.append("\n".join([f"## {group}", *header, *rows, *([""] if notes else []), *notes]) + "\n")
    return "\n".join(sections)


def _row(name: str, found: list[tuple[str, str]], reasons: list[str]) -> str:
    texts = []
    for outcome, reason in found:
        if reason and reason not in reasons:
            reasons.append(reason)
        texts.append(_MARKS[outcome] + (f" <sup>{reasons.index(reason) + 1}</sup>" if reason else ""))
    return f"|{name}|" + "|".join(texts) + "|"
