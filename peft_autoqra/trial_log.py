"""The trials of a search on disk, one JSON line each, so that a killed search goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_autoqra.errors import SearchStateError
from peft_autoqra.plan import BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.trial import Fidelity, Trial, TrialResult, TrialStatus

FORMAT_VERSION = 1


class TrialLog:
    """Append-only JSONL: a header that names the search, then one record a trial.

    Args:
        path: the file; made where missing.
        identity: JSON-ready settings, data and model that make two searches the same.
        resume: continue an existing file; False refuses one.

    Raises:
        SearchStateError: the file belongs to another search, is damaged before its last line, or exists although
            ``resume`` is False.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool = True) -> None:
        """Read what is there, or write the header."""
        self.path = path
        self.trials: list[Trial] = []
        self._by_key: dict[tuple[str, Fidelity], Trial] = {}
        self._identity = json.loads(json.dumps(identity))
        if path.exists() and path.stat().st_size and not resume:
            raise SearchStateError(f"{path} holds a search already; use another output_dir, delete it or set resume.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._read():
            self._append({"kind": "search", "version": FORMAT_VERSION, "identity": self._identity})

    def find(self, plan: BitRankPlan, fidelity: Fidelity) -> Trial | None:
        """The trial of this plan at this fidelity, failed ones included."""
        return self._by_key.get((plan.digest, fidelity))

    def add(self, trial: Trial) -> None:
        """Write a trial; it is on disk when this returns."""
        self._append(_to_record(trial))
        self._remember(trial)

    def _remember(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._by_key[trial.plan.digest, trial.fidelity] = trial

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
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
                record = json.loads(line)
                if number == 1:
                    self._check_header(record)
                else:
                    self._remember(_from_record(record))
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


def _to_record(trial: Trial) -> dict[str, Any]:
    plan = trial.plan
    return {
        "kind": "trial",
        "number": trial.number,
        "origin": trial.origin,
        "plan": {
            "layers": {name: [layer.bits, layer.rank] for name, layer in plan.items()},
            "shapes": plan.shapes,
            "quantizer": asdict(plan.quantizer),
            "initialization": plan.initialization,
        },
        "fidelity": asdict(trial.fidelity),
        "total_bytes": trial.total_bytes,
        "result": asdict(trial.result) | {"status": trial.result.status.value},
    }


def _from_record(record: Mapping[str, Any]) -> Trial:
    plan, result = record["plan"], record["result"]
    return Trial(
        number=record["number"],
        origin=record["origin"],
        plan=BitRankPlan(
            {name: LayerPlan(bits, rank) for name, (bits, rank) in plan["layers"].items()},
            shapes={name: (n, k) for name, (n, k) in plan["shapes"].items()},
            quantizer=QuantizerSettings(**plan["quantizer"]),
            initialization=plan["initialization"],
        ),
        fidelity=Fidelity(**record["fidelity"]),
        total_bytes=record["total_bytes"],
        result=TrialResult(
            **{
                **result,
                "status": TrialStatus(result["status"]),
                "sequence_losses": tuple(result["sequence_losses"]),
            }
        ),
    )
