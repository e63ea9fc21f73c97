"""Where the command ``autoqra`` starts.

``import peft_autoqra`` registers with PEFT and transformers, whose import takes seconds. No help page needs them, nor
does a plan that is shown; so while :func:`main` runs, ``peft_autoqra`` leaves it to the commands that load models.
This module lies outside of the package because a package is imported before anything in it.
"""

from __future__ import annotations

is_running = False
"""Whether this process is the command; processes that it starts may import this module too."""


def main() -> int:
    """Run one command; returns the exit status."""
    global is_running
    is_running = True
    from peft_autoqra.cli import main as run  # noqa: PLC0415 -- see above

    return run()
