"""Bytes of every artefact flipped, zeroed and cut off, then read as the package reads them."""

from __future__ import annotations

import json
import random
import shutil
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.drill.artefacts import Artefact, Refused, find_artefacts, make_quantized_base
from benchmarks.drill.jobs import SearchJob, TrainJob, clear
from benchmarks.drill.outcome import Attempt
from benchmarks.drill.processes import Processes
from peft_autoqra.errors import AutoQRAError

_MOST_ZEROED = 64


@dataclass(frozen=True)
class Damage:
    """What was done to a file.

    Attributes:
        content: of the file now.
        case: how it came to that.
    """

    content: bytes
    case: str


def damage(content: bytes, rng: random.Random) -> Damage:
    """A file with another byte, fewer bytes, or a range of zeros; never the same."""
    while True:
        position = rng.randrange(len(content))
        kind = rng.choice(["flipped", "flipped", "cut", "zeroed"])
        if kind == "flipped":
            value = content[position] ^ rng.randrange(1, 256)
            return Damage(content[:position] + bytes([value]) + content[position + 1 :], f"byte {position} = {value}")
        if kind == "cut":
            return Damage(content[:position], f"cut at {position}")
        num = rng.randrange(1, _MOST_ZEROED)
        zeroed = content[:position] + bytes(len(content[position : position + num])) + content[position + num :]
        if zeroed != content:
            return Damage(zeroed, f"bytes {position} to {position + num} = 0")


def drill_corruption(
    processes: Processes, flags: tuple[str, ...], directory: Path, num: int, seed: str
) -> tuple[list[Attempt], Mapping[str, Any]]:
    """``num`` times for each artefact, a quarter of that where a model is built each time."""
    jobs = SearchJob(flags, directory / "search"), TrainJob(flags, directory / "training")
    for job in jobs:
        clear(job)
        ended = processes.run(job.command())
        if ended.code:
            raise RuntimeError(f"{job.name} fails undisturbed: {ended.output[-2000:]}")
    base = directory / "base"
    shutil.rmtree(base, ignore_errors=True)
    ended = processes.call(make_quantized_base, flags, base).ended()
    if ended.code:
        raise RuntimeError(f"no quantized base could be saved: {ended.output[-2000:]}")
    results = directory / "corruption.jsonl"
    results.unlink(missing_ok=True)
    ended = processes.call(_read_damaged, jobs[0].folder, jobs[1].folder, base, num, seed, results).ended()
    attempts = [Attempt(**json.loads(line)) for line in results.read_text().splitlines()]
    if ended.code:
        attempts.append(Attempt(case="reading damaged files", found="a crash", defect=ended.output[-600:]))
    return attempts, {}


def _read_damaged(search: Path, training: Path, base: Path, num: int, seed: str, results: Path) -> None:
    """In a process of its own, which a crash would end."""
    with results.open("w") as file:
        for artefact in find_artefacts(search, training, base):
            pristine = artefact.path.read_bytes()
            wanted = artefact.read()
            for index in range(max(2, num // 4) if artefact.is_slow else num):
                change = damage(pristine, random.Random(f"{seed} {artefact.name} {index}"))
                artefact.path.write_bytes(change.content)
                attempt = _attempt(artefact, wanted, change.case)
                artefact.path.write_bytes(pristine)
                file.write(json.dumps(vars(attempt)) + "\n")
                file.flush()


def _attempt(artefact: Artefact, wanted: Any, case: str) -> Attempt:
    case = f"{artefact.name}: {case}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = artefact.read()
    except AutoQRAError as error:
        # what has no checksum may be read with another content, such as names of modules, and be refused for that
        names = (artefact.path.name, str(artefact.path.parent))
        is_named = not artefact.has_checksum or any(name in str(error) for name in names)
        defect = None if is_named else f"the error does not name the file: {error}"
        return Attempt(case=case, found=f"{artefact.name}: refused", defect=defect)
    except Exception as error:
        lines = traceback.format_exception(error)
        return Attempt(case=case, found=f"{artefact.name}: foreign error", defect=f"{error!r} {lines[-2]}"[:500])
    found_out = _found_out(artefact, found, wanted)
    defect = "read with other content" if found_out is None else None
    return Attempt(case=case, found=f"{artefact.name}: {found_out or 'wrong content'}", defect=defect)


def _found_out(artefact: Artefact, found: Any, wanted: Any) -> str | None:
    """What became of a file that was read; None for the worst."""
    if isinstance(found, Refused):
        return "noticed, and made again"
    if found == wanted:
        return "read with the same content"
    if artefact.is_prefix is not None and artefact.is_prefix(found, wanted):
        return "read up to the damage, the last line was lost"
    return None if artefact.has_checksum else "not detectable by format"
