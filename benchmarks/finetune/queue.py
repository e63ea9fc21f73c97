"""Working off a configuration, by as many processes as one likes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.finetune.config import Config
from benchmarks.finetune.grid import wanted_runs
from benchmarks.finetune.method import Method
from benchmarks.finetune.plan_method import AllocationUnderWay
from benchmarks.finetune.records import Record, Run, append_record, read_records
from benchmarks.finetune.setting import Setting
from benchmarks.finetune.training import run_method

WAIT_SECONDS = 5.0


@dataclass
class Queue:
    """Takes one run after the other that is neither recorded nor under way elsewhere.

    Attributes:
        config: what to run.
        methods: by name.
        settings: by task.
        records_file: known runs are skipped, new ones added.
        locks: folder of the locks, on one machine.
    """

    config: Config
    methods: Mapping[str, Method]
    settings: Mapping[str, Setting]
    records_file: Path
    locks: Path

    def work(self, report: Callable[[Record], None], *, max_seconds: float | None = None) -> None:
        """Until nothing is left, or no run may be started any more.

        Args:
            report: is called with every new record.
            max_seconds: after which no run is started; None for no limit.
        """
        start = time.monotonic()
        while wanted := self._wanted():
            if max_seconds is not None and time.monotonic() - start > max_seconds:
                return
            records = (self._attempt(run) for run in wanted)
            record = next((record for record in records if record is not None), None)
            if record is None:
                time.sleep(WAIT_SECONDS)  # all that is left is under way elsewhere
            else:
                report(record)

    def _wanted(self) -> list[Run]:
        records = read_records([self.records_file])
        digests = {name: setting.digest for name, setting in self.settings.items()}
        stale = [record.run for record in records if record.digest != digests.get(record.run.task, record.digest)]
        if stale:
            raise SystemExit(
                f"{self.records_file} holds {len(stale)} runs of another recipe, such as {stale[0]}: name a "
                "changed configuration anew, or delete them."
            )
        return [run for run in wanted_runs(self.config, self.methods, records) if run.task in self.settings]

    def _attempt(self, run: Run) -> Record | None:
        """The new record; None where another process has the run or its plan in hand."""
        self.locks.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(repr(run).encode()).hexdigest()[:16]
        try:
            with FileLock(self.locks / f"{name}.lock", timeout=0):
                if run not in self._wanted():  # recorded meanwhile
                    return None
                record = run_method(
                    self.methods[run.method], run, self.settings[run.task], decoded=self.config.decoded
                )
                append_record(self.records_file, record)
                return record
        except (Timeout, AllocationUnderWay):
            return None
