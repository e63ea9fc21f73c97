"""What happened in a search on disk, one JSON line each, so that a killed search goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

from peft_autoqra.errors import SearchStateError
from peft_autoqra.replaced_file import stored
from peft_autoqra.sealed_record import sealed, unsealed
from peft_autoqra.trial import Trial

FORMAT_VERSION = 2
TOLD_AT = "told_at"
"""Of a trial's record: when it was told, seconds since 1970 (UTC). For readers of the log; replaying ignores it."""


@dataclass(frozen=True)
class Asked:
    """Trials were asked for.

    Attributes:
        num: how many.
    """

    num: int


@dataclass(frozen=True)
class Finished:
    """From here on nothing more was explored, because the time was up."""


Event = Asked | Finished | Trial
"""A trial in the log has a result: it was told."""


class TrialLog:
    """Append-only JSONL: a header that names the search, then what was asked and told, in order.

    A search is a deterministic function of that order, so replaying it gives the same state, whatever was evaluated
    side by side.

    Args:
        path: the file; made where missing.
        identity: JSON-ready settings, data and model that make two searches the same.
        resume: continue an existing file; False refuses one.

    Raises:
        SearchStateError: the file belongs to another search, is damaged before its last line, or exists although
            ``resume`` is False.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool = True) -> None:
        """Read what is there, or write the header."""
        self.path = path
        self.events: list[Event] = []
        self._identity = json.loads(json.dumps(identity))
        if path.exists() and path.stat().st_size and not resume:
            raise SearchStateError(f"{path} holds a search already; use another output_dir, delete it or set resume.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._read():
            self._append({"kind": "search", "version": FORMAT_VERSION, "identity": self._identity})

    @property
    def trials(self) -> list[Trial]:
        """The trials with a result, in the order of telling."""
        return [event for event in self.events if isinstance(event, Trial)]

    def add(self, event: Event) -> None:
        """Write an event; it is on disk when this returns.

        Raises:
            ValueError: a trial without a result.
            StorageError: the disk does not take it; what it took of the line is cut off when the log is read again.
        """
        if isinstance(event, Trial) and event.result is None:
            raise ValueError(f"Trial {event.number} has no result to log.")
        self._append(_to_record(event))
        self.events.append(event)

    def _append(self, record: Mapping[str, Any]) -> None:
        with stored(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sealed(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> bool:
        """Take over the records; False where there is no header yet."""
        if not self.path.exists():
            return False
        content = self.path.read_bytes()
        complete, _, partial = content.rpartition(b"\n")
        lines = complete.split(b"\n") if complete else []
        for number, line in enumerate(lines, 1):
            try:
                record = unsealed(json.loads(line))
                if number == 1:
                    self._check_header(record)
                else:
                    self.events.append(_from_record(record))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise self._damaged(number, error) from error
        if partial:  # killed while writing: that record never counted
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(partial))
        return bool(lines)

    def _damaged(self, number: int, error: Exception) -> SearchStateError:
        return SearchStateError(
            f"Line {number} of {self.path} is damaged ({error!r}); remove that line and try again, or use "
            "another output_dir."
        )

    def _check_header(self, header: Mapping[str, Any]) -> None:
        if header.get("kind") != "search" or header.get("version") != FORMAT_VERSION:
            raise SearchStateError(f"{self.path} is no trial log of format {FORMAT_VERSION}; use another output_dir.")
        theirs = header["identity"]
        changed = sorted(k for k in {*theirs, *self._identity} if theirs.get(k) != self._identity.get(k))
        if changed:
            details = ", ".join(f"{k}: {theirs.get(k)!r} there, {self._identity.get(k)!r} now" for k in changed[:3])
            raise SearchStateError(
                f"{self.path} belongs to another search ({details}); use another output_dir, or the same settings."
            )


def _to_record(event: Event) -> dict[str, Any]:
    if isinstance(event, Trial):
        return {"kind": "trial", **event.to_dict(), TOLD_AT: round(time(), 3)}
    return {"kind": "asked", "num": event.num} if isinstance(event, Asked) else {"kind": "finished"}


def _from_record(record: Mapping[str, Any]) -> Event:
    if record["kind"] == "trial":
        trial = Trial.from_dict(record)
        if trial.result is None:
            raise KeyError("result")
        return trial
    if record["kind"] == "finished":
        return Finished()
    if record["kind"] == "asked" and isinstance(record["num"], int) and record["num"] > 0:
        return Asked(record["num"])
    raise ValueError(f"unknown kind {record['kind']!r}")
