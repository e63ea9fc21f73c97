"""The report of a search: one self-contained HTML page, every figure as PNG, every table as CSV."""

from __future__ import annotations

from pathlib import Path

from peft_autoqra.replaced_file import replaced_file
from peft_autoqra.report_data import read_report_data
from peft_autoqra.report_page import build_report

REPORT_FILE = "report.html"


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a search (finished or under way) or of a plan's folder.

    Figures and tables go into a folder beside the page that has its name without the suffix; the page needs none of
    them and no network.

    Args:
        directory: ``output_dir`` of the search.
        output: the page, whose name gets ``.html`` where it has no suffix, or a folder for it; by default
            ``report.html`` in that directory.

    Returns:
        The page's path.

    Raises:
        SearchStateError: there is nothing to report on.
        InvalidPlanError: the plan is damaged.
    """
    directory = Path(directory)
    path = Path(output) if output else directory / REPORT_FILE
    if path.is_dir():
        path /= REPORT_FILE
    elif not path.suffix:
        path = path.with_suffix(".html")
    folder = path.with_suffix("")
    report = build_report(read_report_data(directory), folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {folder / name: content for name, content in report.files.items()} | {path: report.page.encode()}
    for file, content in contents.items():
        with replaced_file(file) as partial:
            partial.write_bytes(content)
    return path
