"""Where the command ``autoqra`` starts.

``import peft_autoqra`` registers with PEFT and transformers, whose import takes seconds. No help page needs them, nor
does a plan that is shown; so where this module was imported first, ``peft_autoqra`` leaves it to the commands that
load models. It lies outside of the package because a package is imported before anything in it.
"""

from __future__ import annotations


def main() -> int:
    """Run one command; returns the exit status."""
    from peft_autoqra.cli import main as run  # noqa: PLC0415 -- Ctrl+C is quiet from here on

    return run()
