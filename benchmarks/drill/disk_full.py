"""A disk that is full at some byte, then has room again."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.drill.jobs import Job, SearchJob, TrainJob, clear, differences, start_again
from benchmarks.drill.outcome import Attempt
from benchmarks.drill.processes import Command, Ended, Processes

ROOM_BYTES = 2**28
_PAGE_BYTES = 4096


class SmallDisk:
    """A file system in memory whose size can be changed; mounting one takes root.

    Args:
        directory: where it is mounted.
    """

    def __init__(self, directory: Path) -> None:
        """Nothing is mounted yet."""
        self.directory = directory

    @contextlib.contextmanager
    def mounted(self) -> Iterator[bool]:
        """Whether it could be."""
        self.directory.mkdir(parents=True, exist_ok=True)
        mounted = _mount("-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "tmpfs", str(self.directory))
        try:
            yield mounted
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(self.directory)], check=True)

    def resize(self, num_bytes: int) -> None:
        """Full at that size, as far as more than it is there; that is kept."""
        pages = max(num_bytes, self.used_bytes) // _PAGE_BYTES
        if not _mount("-o", f"remount,size={max(1, pages) * _PAGE_BYTES}", str(self.directory)):
            raise OSError(f"{self.directory} cannot be resized")

    @property
    def used_bytes(self) -> int:
        """Of the files there."""
        return shutil.disk_usage(self.directory).used


def _mount(*arguments: str) -> bool:
    command = shutil.which("mount")
    return command is not None and subprocess.run([command, *arguments], capture_output=True).returncode == 0


class FullDiskDrill:
    """Runs one job against limits of space.

    Args:
        processes: where it runs.
        job: what is starved.
        disk: that holds the job's folder, where one could be mounted; else files are limited in size.
    """

    def __init__(self, processes: Processes, job: Job, disk: SmallDisk | None) -> None:
        """Run the job with room, and measure what it takes."""
        self._processes, self._job, self._disk = processes, job, disk
        self._empty()
        ended = processes.run(job.command())
        if ended.code:
            raise RuntimeError(f"{job.name} fails undisturbed: {ended.output[-2000:]}")
        self._reference = job.state()
        sizes = [path.stat().st_size for path in job.folder.rglob("*") if path.is_file()]
        self._most_bytes = disk.used_bytes if disk else max(sizes)

    def starved(self, rng: random.Random) -> Attempt:
        """From nothing, with too little room at first."""
        self._empty()
        limit = rng.randrange(2 * _PAGE_BYTES, self._most_bytes + _PAGE_BYTES)
        ended = self._run_within(limit)
        defect = self._defect(ended) or self._job.partway_defect(self._reference)
        self._room()
        again = start_again(self._processes, self._job)
        return self._attempt(f"{self._job.name} with {limit} bytes", ended, defect or self._final_defect(again))

    def starved_again(self, rng: random.Random) -> Attempt:
        """Where a finished run lies already: what is there must survive that it cannot be replaced."""
        self._empty()
        self._processes.run(self._job.command())
        with contextlib.suppress(StopIteration):
            shutil.rmtree(next(self._job.folder.glob("calibration")))  # so that there is something to write
        for checkpoint in self._job.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        before = self._disk.used_bytes if self._disk else 0
        limit = rng.randrange(before + 1, before + self._most_bytes // 2)
        ended = self._run_within(limit)
        defect = self._defect(ended) or differences(self._job.state(), self._reference)
        self._room()
        again = start_again(self._processes, self._job)
        case = f"{self._job.name} over a finished one with {limit} bytes"
        return self._attempt(case, ended, defect or self._final_defect(again))

    def _run_within(self, limit_bytes: int) -> Ended:
        command: Command = self._job.command()
        if self._disk:
            self._disk.resize(limit_bytes)
            return self._processes.run(command)
        return self._processes.run(replace(command, disturb=partial(limit_file_size, max(limit_bytes, 2**15))))

    def _empty(self) -> None:
        self._room()
        clear(self._job)

    def _room(self) -> None:
        if self._disk:
            self._disk.resize(ROOM_BYTES)

    def _attempt(self, case: str, ended: Ended, defect: str | None) -> Attempt:
        kind = "there was room enough" if ended.code == 0 else "refused, then ended as if undisturbed"
        return Attempt(case=case, found=f"{self._job.name}: {kind if defect is None else 'lost'}", defect=defect)

    def _defect(self, ended: Ended) -> str | None:
        if ended.code == 0 or ended.is_clear_error:
            return None
        return f"no clear error: exit status {ended.code}, {ended.output[-700:]}"

    def _final_defect(self, ended: Ended) -> str | None:
        if ended.code:
            return f"it cannot go on: exit status {ended.code}, {ended.output[-600:]}"
        return differences(self._job.state(), self._reference)


def limit_file_size(num_bytes: int) -> None:
    """Let the process write no file beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def drill_full_disks(
    processes: Processes, flags: tuple[str, ...], directory: Path, num: int, seed: str
) -> tuple[list[Attempt], Mapping[str, Any]]:
    """Both jobs, from nothing and over a finished run, ``num`` times each."""
    attempts: list[Attempt] = []
    disk = SmallDisk(directory / "disk")
    with disk.mounted() as mounted:
        for kind in (SearchJob, TrainJob):
            job = kind(flags, disk.directory / kind.name)
            drill = FullDiskDrill(processes, job, disk if mounted else None)
            for index in range(num):
                attempts.append(drill.starved(random.Random(f"{seed} {job.name} {index}")))
                attempts.append(drill.starved_again(random.Random(f"{seed} {job.name} again {index}")))
            clear(job)
    return attempts, {"limited": "a tmpfs" if mounted else "the size of files"}
