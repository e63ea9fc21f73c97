"""The command ``autoqra`` in processes of their own, forked from one that has imported everything.

Starting Python with torch and transformers takes longer than a search of a tiny model. The server that
``multiprocessing`` forks from imports once and runs nothing, so a fork of it is as good as a fresh process: it ends by
SIGKILL, has its own files and memory, and takes its locks with it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = ("peft_autoqra.cli", "peft_autoqra.commands.search", "peft_autoqra.commands.train")
JOIN_SECONDS = 300.0


def warm_context() -> ForkServerContext:
    """Processes that start with everything imported, and one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONFAULTHANDLER"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"  # of semaphores that killed processes had
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, and what is around it.

    Attributes:
        argv: after ``autoqra``.
        environment: variables that are different.
        disturb: is called in the process before the command; picklable.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    disturb: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit status; negative for a signal.
        output: what it printed.
        seconds: that it ran.
    """

    code: int
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        """Where a command says what went wrong."""
        return (self.output.strip().splitlines() or [""])[-1]

    @property
    def is_clear_error(self) -> bool:
        """Refused on purpose, in words, without a traceback."""
        return self.code in (2, 3, 4) and self.last_line.startswith("autoqra") and "Traceback" not in self.output


class Processes:
    """Starts them.

    Args:
        directory: for what they print, their caches and their temporary files.
    """

    def __init__(self, directory: Path) -> None:
        """Nothing is started before the first command."""
        self._context = warm_context()
        self._directory = directory
        self._number = 0

    def start(self, command: Command) -> Running:
        """One command in a process of its own."""
        return self.call(_run, command)

    def call(self, function: Callable[..., None], *arguments: Any) -> Running:
        """A function in a process of its own; what it prints is kept."""
        self._number += 1
        output = self._directory / f"output-{self._number}"
        environment = {
            "HF_HOME": str(self.caches),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self.temporary_directory),
        }
        process = self._context.Process(target=_begin, args=(output, environment, function, *arguments))
        process.start()
        return Running(process, output)

    def run(self, command: Command) -> Ended:
        """One command to its end."""
        return self.start(command).ended()

    @property
    def caches(self) -> Path:
        """Where libraries keep prepared data."""
        return self._directory / "hf"

    @property
    def temporary_directory(self) -> Path:
        """Where the processes leave what they do not clear up."""
        directory = self._directory / "tmp"
        directory.mkdir(exist_ok=True)
        return directory


class Running:
    """A process that was started."""

    def __init__(self, process: ForkServerProcess, output: Path) -> None:
        """It runs already."""
        self._process, self._output = process, output
        self._start = time.perf_counter()

    def ended(self, kill_after: float | None = None) -> Ended:
        """Wait for it.

        Args:
            kill_after: seconds after which it gets SIGKILL; None is never.

        Raises:
            TimeoutError: it hangs.
        """
        self._process.join(JOIN_SECONDS if kill_after is None else kill_after)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            if kill_after is None:
                raise TimeoutError(f"a process did not end within {JOIN_SECONDS:g} s: {self._printed()[-500:]}")
        seconds = time.perf_counter() - self._start
        code = self._process.exitcode
        self._process.close()
        printed = self._printed()
        self._output.unlink(missing_ok=True)
        return Ended(code=code if code is not None else -1, output=printed, seconds=seconds)

    def _printed(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""


def _begin(output: Path, environment: Mapping[str, str], function: Callable[..., None], *arguments: Any) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    _own_caches(environment)
    function(*arguments)


def _own_caches(environment: Mapping[str, str]) -> None:
    """Libraries that were imported before the fork have read their variables."""
    import tempfile  # noqa: PLC0415 - before the package is

    import datasets  # noqa: PLC0415

    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_HOME"], "datasets")
    tempfile.tempdir = environment["TMPDIR"]


def _run(command: Command) -> None:
    import sys  # noqa: PLC0415

    from peft_autoqra import cli  # noqa: PLC0415

    os.environ.update(command.environment)
    if command.disturb is not None:
        command.disturb()
    sys.exit(cli.main(list(command.argv)))
