"""``autoqra report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft_autoqra.report import REPORT_FILE, write_report


def run(argv: Sequence[str]) -> int:
    """Write the page and print its path; returns the exit status.

    Raises:
        AutoQRAError: there is nothing to report on.
    """
    parser = argparse.ArgumentParser(
        prog="autoqra report", description="Write one HTML page about a search (or about a plan alone).", add_help=True
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="output_dir of a search, finished or under way")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"where to write; DIR/{REPORT_FILE} by default")
    options = parser.parse_args(argv)
    print(write_report(options.directory, options.output))  # noqa: T201
    return 0
