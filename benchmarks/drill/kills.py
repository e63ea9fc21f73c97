"""SIGKILL at random moments, then the same command again until it ends."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.drill.jobs import Job, clear, differences, start_again
from benchmarks.drill.outcome import Attempt
from benchmarks.drill.processes import Ended, Processes

_KILLED = -9
_MAX_STARTS = 200


class KillDrill:
    """Kills one job again and again.

    Each start of a job is killed at a moment drawn uniformly from the time that the undisturbed job takes. A start
    that ends before its moment ends an episode: its files are compared with the undisturbed ones, and the next
    episode begins in an empty directory.

    Args:
        processes: where it runs.
        job: what is killed.
        caches: folders that are emptied before each episode.
    """

    def __init__(self, processes: Processes, job: Job, caches: tuple[Path, ...]) -> None:
        """Run the job undisturbed, twice: the first time some libraries look at the machine."""
        self._processes, self._job, self._caches = processes, job, caches
        for _ in range(2):
            clear(job, *caches)
            ended = processes.run(job.command())
            if ended.code:
                raise RuntimeError(f"{job.name} fails undisturbed: {ended.output[-2000:]}")
        self.seconds = ended.seconds
        self.reference = job.state()
        self.stray_bytes = 0

    def run(self, num_kills: int, rng: random.Random) -> list[Attempt]:
        """Episodes until there were that many kills."""
        attempts: list[Attempt] = []
        while len(attempts) < num_kills:
            attempts += self._episode(num_kills - len(attempts), rng)
        return attempts

    def _episode(self, most: int, rng: random.Random) -> list[Attempt]:
        clear(self._job, *self._caches)
        moments: list[float] = []
        defects: list[str | None] = []
        for _ in range(_MAX_STARTS):
            moment = rng.uniform(0, self.seconds) if len(moments) < most else None
            before = self._job.log_lines()
            ended = start_again(self._processes, self._job, moment)
            if self._job.log_lines()[: len(before)] != before:
                defects.append("what was logged is no longer in the log")
            if ended.code != _KILLED:
                break
            moments.append(moment or 0.0)
            defects.append(self._job.partway_defect(self.reference))
        defects.append(self._final_defect(ended))
        defect = next((defect for defect in defects if defect is not None), None)
        self.stray_bytes = max(self.stray_bytes, self._stray_bytes())
        num = len(moments)
        cases = [f"{self._job.name} killed after {moment:.3f} s ({i} of {num})" for i, moment in enumerate(moments, 1)]
        found = f"{self._job.name} ended as if undisturbed" if defect is None else f"{self._job.name} did not"
        return [Attempt(case=case, found=found, defect=defect) for case in cases]

    def _final_defect(self, ended: Ended) -> str | None:
        if ended.code:
            return f"it cannot go on: exit status {ended.code}, {ended.output[-600:]}"
        return differences(self._job.state(), self.reference)

    def _stray_bytes(self) -> int:
        """What killed processes left and nobody will read: temporary files of this package and of others."""
        folders = (self._job.folder, *self._caches, self._processes.temporary_directory)
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        words = ("partial", "incomplete", self._processes.temporary_directory.as_posix())
        stray = [path for path in files if any(word in path.as_posix() for word in words)]
        return sum(path.stat().st_size for path in stray)

    def figures(self) -> dict[str, Any]:
        """Beside the counts."""
        return {
            f"{self._job.name}_undisturbed_seconds": round(self.seconds, 2),
            f"{self._job.name}_most_stray_bytes": self.stray_bytes,
        }
