"""NaN, lack of memory, and hangs, in the forward pass of the model at random trials and steps."""

from __future__ import annotations

import json
import random
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaModel

from benchmarks.drill.jobs import NUM_STEPS, SAVE_STEPS, SearchJob, TrainJob, clear, differences
from benchmarks.drill.outcome import Attempt
from benchmarks.drill.processes import Command, Ended, Processes
from peft_autoqra.evaluation.sft import SFTEvaluator
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.trial import Fidelity, TrialResult

MAX_TRIAL_SECONDS = 6
_CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
_TOO_MANY_BYTES = 2**50


def raise_cuda_error() -> None:
    """What torch raises when a GPU is full."""
    raise torch.OutOfMemoryError(_CUDA_MESSAGE)


def allocate() -> None:
    """More than any machine has, so that torch's allocator for the CPU raises."""
    torch.empty(_TOO_MANY_BYTES, dtype=torch.uint8)


def hang() -> None:
    """Longer than a trial may take."""
    time.sleep(10 * MAX_TRIAL_SECONDS)


KINDS: Mapping[str, Callable[[], None] | None] = {
    "NaN": None,  # in what the model gives back
    "CUDA out of memory": raise_cuda_error,
    "CPU out of memory": allocate,
    "time-out": hang,
}
_EXPECTED = {
    "NaN": "loss is nan",
    "CUDA out of memory": "Out of memory",
    "CPU out of memory": "Out of memory",
    "time-out": "TimeLimitExceeded",
}


@dataclass(frozen=True)
class Trouble:
    """Disturbs forward passes of the process it is called in.

    Attributes:
        seed: decides which trials, after how many forward passes, and how.
        share: of the trials.
        record: file that gets a line for each disturbed trial: its plan, fidelity and kind.
    """

    seed: str
    share: float
    record: Path

    def __call__(self) -> None:
        """Patch the model's class and the evaluator."""
        state: dict[str, Any] = {"kind": None, "passes": 0}
        evaluate = SFTEvaluator.evaluate

        def troubled(evaluator: SFTEvaluator, plan: BitRankPlan, fidelity: Fidelity) -> TrialResult:
            rng = random.Random(zlib.crc32(f"{self.seed} {plan.digest} {fidelity}".encode()))
            if rng.random() < self.share:
                state.update(kind=rng.choice(sorted(KINDS)), passes=rng.randrange(1 + fidelity.num_steps))
            try:
                return evaluate(evaluator, plan, fidelity)
            finally:
                state["kind"] = None

        SFTEvaluator.evaluate = troubled  # type: ignore[method-assign]
        _disturb_forward(state, self.record)


@dataclass(frozen=True)
class TrainingTrouble:
    """Disturbs a forward pass of a fine-tune; with NaN its gradients are NaN, and then the weights.

    Attributes:
        kind: one of ``KINDS``.
        passes: before it.
        record: file that gets a line.
    """

    kind: str
    passes: int
    record: Path

    def __call__(self) -> None:
        """Patch the model's class; calibration does not run in training mode and so is not counted."""
        _disturb_forward({"kind": self.kind, "passes": self.passes, "only_training": True}, self.record)


def _disturb_forward(state: dict[str, Any], record: Path) -> None:
    forward = LlamaModel.forward  # the decoder: TRL computes losses without the whole model's forward

    def disturbed(model: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(model, *args, **kwargs)
        kind = state["kind"]
        if kind is None or (state.get("only_training") and not model.training):
            return output
        state["passes"] -= 1
        if state["passes"] >= 0:
            return output
        with record.open("a") as file:
            file.write(f"{kind}\n")
        act = KINDS[kind]
        state["kind"] = None
        if act is not None:
            act()
        output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    LlamaModel.forward = disturbed  # type: ignore[method-assign]


def drill_trouble(
    processes: Processes, flags: tuple[str, ...], directory: Path, num: int, seed: str
) -> tuple[list[Attempt], Mapping[str, Any]]:
    """``num`` searches and as many fine-tunes."""
    attempts = [_search(processes, SearchJob(flags, directory / "search"), f"{seed} {index}") for index in range(num)]
    trained = _TroubledTraining(processes, TrainJob(flags, directory / "training"))
    attempts += [trained.attempt(random.Random(f"{seed} {index}")) for index in range(num)]
    return attempts, {}


def _search(processes: Processes, job: SearchJob, seed: str) -> Attempt:
    """A search with trouble, and again with a kill in between; the same trials fail in both."""
    clear(job)
    record = job.folder.with_name("trouble")
    record.unlink(missing_ok=True)
    command = replace(
        job.command("--max_trial_seconds", str(MAX_TRIAL_SECONDS)), disturb=Trouble(seed, share=0.4, record=record)
    )
    ended = processes.run(command)
    kinds = record.read_text().splitlines() if record.exists() else []
    case = f"search with trouble of seed {seed!r}: {kinds}"
    num = "a search without trouble" if not kinds else f"a search with {len(kinds)} failing trials"
    defect = _search_defect(job, ended, kinds) or _resumed_defect(processes, job, command, ended, seed)
    return Attempt(case=case, found=num if defect is None else "lost", defect=defect)


def _search_defect(job: SearchJob, ended: Ended, kinds: list[str]) -> str | None:
    records = [json.loads(line) for line in job.log_lines()]
    results = [record["result"] for record in records if record["kind"] == "trial"]
    errors = [result["error"] for result in results if result["status"] == "failed"]
    told_kinds = [kind for error, kind in zip(errors, kinds, strict=False) if _EXPECTED[kind] in error]
    if len(errors) != len(kinds) or len(told_kinds) != len(kinds):
        return f"trials failed by {errors}, they were disturbed by {kinds}"
    if ended.is_clear_error and (refused := re.search(r"came through all its trials of (\d+) steps", ended.last_line)):
        healthy = _healthy_plans([record for record in records if record["kind"] == "trial"], int(refused[1]))
        return f"{len(healthy)} plans did not fail, but: {ended.last_line}" if healthy else None
    if ended.code:
        return f"exit status {ended.code}: {ended.output[-600:]}"
    winner = json.loads((job.folder / "search_result.json").read_text())["winner"]
    if winner["loss"] is None or winner["error"] is not None:
        return f"the winner failed: {winner}"
    BitRankPlan.from_pretrained(job.folder / "plan")
    return None


def _healthy_plans(trials: Iterable[Mapping[str, Any]], num_steps: int) -> list[str]:
    """Those that completed every trial of so many steps, as JSON."""
    statuses: dict[str, set[str]] = {}
    for trial in trials:
        if trial["fidelity"]["num_steps"] == num_steps:
            plan = json.dumps(trial["plan"]["layers"], sort_keys=True)
            statuses.setdefault(plan, set()).add(trial["result"]["status"])
    return [plan for plan, found in statuses.items() if found == {"completed"}]


def _resumed_defect(processes: Processes, job: SearchJob, command: Command, ended: Ended, seed: str) -> str | None:
    if ended.code:
        return None
    wanted = job.state()
    clear(job)
    processes.start(command).ended(random.Random(seed).uniform(0, ended.seconds))
    again = processes.run(command)
    if again.code:
        return f"after a kill it cannot go on: exit status {again.code}, {again.output[-600:]}"
    return differences(job.state(), wanted)


class _TroubledTraining:
    """Fine-tunes with trouble over a finished adapter, which must stay as it is, and then without."""

    def __init__(self, processes: Processes, job: TrainJob) -> None:
        """Train undisturbed."""
        self._processes, self._job = processes, job
        clear(job)
        ended = processes.run(job.command())
        if ended.code:
            raise RuntimeError(f"training fails undisturbed: {ended.output[-2000:]}")
        self._reference = job.state()

    def attempt(self, rng: random.Random) -> Attempt:
        """One more."""
        job = self._job
        for checkpoint in job.folder.glob("checkpoint-*"):
            _remove(checkpoint)
        adapter = (job.folder / ADAPTER_FILE).read_bytes()
        kind = rng.choice([kind for kind in KINDS if kind != "time-out"])
        step = rng.randrange(NUM_STEPS)
        record = job.folder.with_name("training-trouble")
        ended = self._processes.run(replace(job.command(), disturb=TrainingTrouble(kind, step, record)))
        defect = None
        named = "held-out loss is nan" if kind == "NaN" else "Out of memory"
        if not ended.is_clear_error or named not in ended.last_line:
            defect = f"no clear error: exit status {ended.code}, {ended.output[-600:]}"
        elif (job.folder / ADAPTER_FILE).read_bytes() != adapter:
            defect = "the adapter that was there is another one"
        for checkpoint in job.folder.glob("checkpoint-*"):  # NaN is in those after it: go on from the one before
            if int(checkpoint.name.split("-")[1]) > step // SAVE_STEPS * SAVE_STEPS:
                _remove(checkpoint)
        again = self._processes.run(job.command())
        if defect is None:
            defect = differences(job.state(), self._reference) if again.code == 0 else again.output[-600:]
        found = f"training with {kind}: refused, then ended as if undisturbed"
        case = f"training with {kind} at step {step + 1}"
        return Attempt(case=case, found=found if defect is None else "lost", defect=defect)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
