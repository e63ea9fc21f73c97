"""Several searches started on one directory."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.drill.jobs import SearchJob, clear, differences
from benchmarks.drill.outcome import Attempt
from benchmarks.drill.processes import Processes

_KILLED = -9


def drill_races(
    processes: Processes, flags: tuple[str, ...], directory: Path, num: int, seed: str
) -> tuple[list[Attempt], Mapping[str, Any]]:
    """``num`` races of two to four searches; in every second one of them one search is killed."""
    job = SearchJob(flags, directory / "search")
    clear(job)
    ended = processes.run(job.command())
    if ended.code:
        raise RuntimeError(f"search fails undisturbed: {ended.output[-2000:]}")
    race = _Race(processes, job, job.state(), ended.seconds)
    return [race.attempt(random.Random(f"{seed} {index}"), with_kill=index % 2 == 1) for index in range(num)], {}


class _Race:
    def __init__(self, processes: Processes, job: SearchJob, reference: Mapping[str, Any], seconds: float) -> None:
        self._processes, self._job, self._reference, self._seconds = processes, job, reference, seconds

    def attempt(self, rng: random.Random, *, with_kill: bool) -> Attempt:
        clear(self._job)
        num = rng.choice([2, 2, 3, 4])
        delays = [rng.choice([0.0, 0.05, rng.uniform(0, self._seconds)]) for _ in range(num - 1)]
        running = [self._processes.start(self._job.command())]
        for delay in delays:
            time.sleep(delay)
            running.append(self._processes.start(self._job.command()))
        moment = rng.uniform(0, self._seconds) if with_kill else None
        ends = [running[0].ended(moment), *(process.ended() for process in running[1:])]
        refused = [end for end in ends if end.is_clear_error and "Another search is running" in end.last_line]
        whole = [end for end in ends if end.code == 0]
        killed = [end for end in ends if end.code == _KILLED]
        case = f"{num} searches, delays {[round(delay, 3) for delay in delays]}, first killed after {moment}"
        defect = None
        if len(refused) + len(whole) + len(killed) != num:
            defect = next(end.output[-600:] for end in ends if end not in (*refused, *whole, *killed))
        elif not whole and not killed:
            defect = "all were refused"
        elif not whole:
            again = self._processes.run(self._job.command())
            defect = None if again.code == 0 else again.output[-600:]
        defect = defect or differences(self._job.state(), self._reference) or self._job.partway_defect(self._reference)
        how = "the others refused, result as if undisturbed" if refused else "one after another"
        found = f"{num} searches, {how}"
        return Attempt(case=case, found=found if defect is None else "lost", defect=defect)
