"""The command ``autoqra``."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from io import UnsupportedOperation

from peft_autoqra.commands.help_pages import known_command, requested_page
from peft_autoqra.commands.outcome import Outcome, error_document, outcome_document
from peft_autoqra.commands.registry import COMMANDS
from peft_autoqra.errors import AutoQRAError, HubError, SearchBudgetError, UnreachableBudgetError

EXIT_INTERNAL_ERROR, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141
_EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (  # the first that fits
    (UnreachableBudgetError, 3),
    (SearchBudgetError, 3),
    (HubError, 4),
    (AutoQRAError, EXIT_ERROR),
    (OSError, EXIT_ERROR),  # an output_dir that cannot be made, a full disk
    (KeyboardInterrupt, EXIT_INTERRUPTED),
    (Exception, EXIT_INTERNAL_ERROR),
)
_JSON = "--json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see ``help_pages.EXIT_CODES``.

    Args:
        argv: the command and its flags; the process's own by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = _JSON in arguments
    arguments = [argument for argument in arguments if argument != _JSON]
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        text = requested_page(arguments)
        if text is None:
            known_command(arguments[0])
            text = _run(arguments[0], arguments[1:], as_json=as_json)
    except (Exception, KeyboardInterrupt) as error:
        return _fail(command, error, as_json=as_json)
    return 0 if text is None else _write(text)


def _run(name: str, arguments: Sequence[str], *, as_json: bool) -> str | None:
    """What is to be printed; None in processes of a distributed run that are to be silent."""
    if not as_json:
        outcome = _outcome(name, arguments)
        return None if outcome is None else outcome.text
    with _stdout_to_stderr():
        outcome = _outcome(name, arguments)
    return None if outcome is None else outcome_document(name, outcome.data)


def _outcome(name: str, arguments: Sequence[str]) -> Outcome | None:
    if not COMMANDS[name].is_light:
        # TRL passes transformers the old name of this setting; users can do nothing about it.
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
        import_module("peft_autoqra.registration").register()
        if not sys.stderr.isatty():  # a file of log lines is no place for bars; ours keep to that themselves
            import_module("datasets").disable_progress_bars()
    outcome: Outcome | None = import_module(f"peft_autoqra.commands.{name}").run(arguments)
    return outcome


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever trainers, trackers, compilers and other processes print meanwhile is no part of the document."""
    sys.stdout.flush()
    with redirect_stdout(sys.stderr):
        try:
            descriptor = sys.__stdout__.fileno()  # type: ignore[union-attr]
            kept = os.dup(descriptor)
        except (AttributeError, OSError, UnsupportedOperation):  # no real file, as in a notebook
            yield
            return
        os.dup2(sys.__stderr__.fileno(), descriptor)  # type: ignore[union-attr]
        try:
            yield
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)


def _fail(command: str | None, error: BaseException, *, as_json: bool) -> int:
    exit_code = next(code for kind, code in _EXIT_CODES if isinstance(error, kind))
    if isinstance(error, KeyboardInterrupt):
        goes_on = command is not None and COMMANDS[command].goes_on
        error = KeyboardInterrupt("stopped; the same command goes on from here." if goes_on else "stopped.")
    message = " ".join(str(error).split()) or type(error).__name__
    if exit_code == EXIT_INTERNAL_ERROR:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {message} This is a defect; please report it with the lines above."
    print(f"autoqra {command}: {message}" if command else f"autoqra: {message}", file=sys.stderr)  # noqa: T201
    if as_json and os.environ.get("RANK", "0") == "0":  # one document from all processes of a distributed run
        _write(error_document(command, error, exit_code))
    return exit_code


def _write(text: str) -> int:
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        with suppress(AttributeError, OSError, UnsupportedOperation):  # so that nothing is flushed to it at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())
