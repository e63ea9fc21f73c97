"""``autoqra report``."""

from __future__ import annotations

from collections.abc import Sequence

from peft_autoqra.commands.folder_parsers import report_parser
from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.report import write_report


def run(argv: Sequence[str]) -> Outcome:
    """Write the page; its path is the outcome.

    Raises:
        AutoQRAError: there is nothing to report on.
    """
    options = report_parser().parse_args(argv)
    path = write_report(options.directory, options.output)
    return Outcome(str(path), {"report": str(path)})
