"""What befalls workers, at a place where it hurts; modules that processes of a cluster can import."""

from __future__ import annotations

import itertools
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from peft_autoqra.executors.worker_files import WorkerFiles


@dataclass(frozen=True)
class Misfortune:
    """A forward hook that waits for a file to appear, takes it away, and ends or hangs the process that it is in.

    Attributes:
        path: of the file.
    """

    path: Path

    def __call__(self, *_: object) -> None:
        try:
            what = self.path.read_text()
            self.path.unlink()  # one process is the first
        except FileNotFoundError:
            return
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        sum(itertools.repeat(0, 10**15))  # compiled code that looks at no signal


@dataclass(frozen=True)
class Pause:
    """A forward hook that waits until a file goes away.

    Attributes:
        path: of the file.
    """

    path: Path

    def __call__(self, *_: object) -> None:
        while self.path.exists():
            time.sleep(0.05)


@dataclass(frozen=True)
class UnseenFiles(WorkerFiles):
    """Files whose folders other machines do not see.

    Attributes:
        real: where they lie.
    """

    real: WorkerFiles

    def all(self) -> dict[str, Path]:
        return self.real.all()
