"""The two commands that are disturbed, and how to see that one ended as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.drill.processes import Command, Ended, Processes
from peft_autoqra.errors import AutoQRAError
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_file import ADAPTER_FILE, PLAN_FILE, read_header
from peft_autoqra.sealed_record import unsealed
from tests.tiny_folder import SEARCH_FLAGS, make_tiny_folder

_TIMES = {"seconds", "ended_seconds", "told_at", "train_seconds", "checksum"}
"""Keys of what a clock says, and of checksums over it."""

_SINCE_START = {"train_loss", "measured"}
"""Of a fine-tune's figures those that are, as in transformers, of the steps since it was last started."""
NUM_STEPS, SAVE_STEPS = 8, 2


def make_inputs(directory: Path) -> None:
    """A tiny model, its tokenizer and data; runs in a process of its own, so that no thread of torch is forked."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    make_tiny_folder(directory, LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)))


@dataclass(frozen=True)
class SearchJob:
    """``autoqra search``.

    Args:
        flags: model, data and recipe.
        folder: output directory.
    """

    flags: tuple[str, ...]
    folder: Path
    name = "search"

    def command(self, *more: str) -> Command:
        """The same command each time."""
        return Command(argv=("search", *self.flags, *SEARCH_FLAGS, "--output_dir", str(self.folder), *more))

    def log_lines(self) -> list[bytes]:
        """Whole lines of the trial log."""
        log = self.folder / "trials.jsonl"
        return log.read_bytes().split(b"\n")[:-1] if log.exists() else []

    def state(self) -> dict[str, Any]:
        """All that a finished search leaves and no clock has written."""
        report = (self.folder / "report.html").read_text(encoding="utf-8")
        return {
            "trials": [_timeless(json.loads(line)) for line in self.log_lines()],
            "result": _timeless(json.loads((self.folder / "search_result.json").read_text())),
            "plan": _plan_state(self.folder / "plan"),
            "recipe": (self.folder / "recipe.yaml").read_text(),
            "report": (report.startswith("<!"), report.rstrip().endswith("</html>")),
        }

    def partway_defect(self, reference: Mapping[str, Any]) -> str | None:
        """What of an unfinished search can be read as if it were whole, and is not."""
        numbers = [record["number"] for record in map(json.loads, self.log_lines()) if record["kind"] == "trial"]
        if len(numbers) != len(set(numbers)):
            return f"a trial is logged twice: {numbers}"
        result = self.folder / "search_result.json"
        if result.exists() and _timeless(unsealed(json.loads(result.read_text()))) != reference["result"]:
            return "search_result.json is there and not that of the whole search"
        report = self.folder / "report.html"
        if report.exists() and not report.read_text(encoding="utf-8").rstrip().endswith("</html>"):
            return "half a report"
        if not (self.folder / "plan" / PLAN_FILE).exists():
            return None
        try:
            state = _plan_state(self.folder / "plan")
        except AutoQRAError:
            return None  # refused
        return None if state == reference["plan"] else "the plan is read and is not that of the whole search"


@dataclass(frozen=True)
class TrainJob:
    """``autoqra train`` with checkpoints.

    Args:
        flags: model, data and recipe.
        folder: output directory.
    """

    flags: tuple[str, ...]
    folder: Path
    name = "training"

    def command(self, *more: str) -> Command:
        """From the last checkpoint where there is one, as a script of a cluster would do it."""
        steps = ("--max_steps", str(NUM_STEPS), "--save_strategy", "steps", "--save_steps", str(SAVE_STEPS))
        resume = ("--resume_from_checkpoint", "true") if any(self.folder.glob("checkpoint-*")) else ()
        adapter = ("--bits", "3", "--r", "4", "--num_calibration_sequences", "4")
        return Command(argv=("train", *self.flags, *steps, *adapter, "--output_dir", str(self.folder), *resume, *more))

    def log_lines(self) -> list[bytes]:
        """It keeps none."""
        return []

    def state(self) -> dict[str, Any]:
        """All that a finished fine-tune leaves and no clock has written."""
        result = json.loads((self.folder / "finetune_result.json").read_text())
        return {
            **self._adapter_state(),
            "config": json.loads((self.folder / "adapter_config.json").read_text()),
            "result": {key: value for key, value in _timeless(result).items() if key not in _SINCE_START},
        }

    def partway_defect(self, reference: Mapping[str, Any]) -> str | None:
        """What of an unfinished fine-tune can be read as if it were whole, and is not."""
        if not (self.folder / ADAPTER_FILE).exists():
            return None
        state = self._adapter_state()
        return None if state.items() <= reference.items() else "an adapter is there that is not the trained one"

    def _adapter_state(self) -> dict[str, Any]:
        path = self.folder / ADAPTER_FILE
        tensors = {name: (t.dtype.name, t.shape, t.tobytes()) for name, t in load_file(path).items()}
        return {"tensors": tensors, "header": read_header(path)}


Job = SearchJob | TrainJob


def clear(job: Job, *caches: Path) -> None:
    """As before the first start."""
    for folder in (job.folder, *caches):
        shutil.rmtree(folder, ignore_errors=True)


def start_again(processes: Processes, job: Job, kill_after: float | None = None) -> Ended:
    """The same command; where no checkpoint is whole it says so, and begins anew without that flag, as it asks for."""
    ended = processes.start(job.command()).ended(kill_after)
    if ended.code == 2 and "there is no checkpoint" in ended.last_line:
        for checkpoint in job.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return processes.start(job.command()).ended(kill_after)
    return ended


def differences(state: Mapping[str, Any], reference: Mapping[str, Any]) -> str | None:
    """Which parts of two states differ, and by what where that is short."""
    different = [key for key in reference if state.get(key) != reference[key]]
    if not different:
        return None
    return f"{different} differ: " + "; ".join(_difference(state.get(key), reference[key]) for key in different)[:600]


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in {*found, *wanted} if found.get(key) != wanted.get(key)]
        return ", ".join(f"{key}: {str(found.get(key))[:80]} for {str(wanted.get(key))[:80]}" for key in sorted(keys))
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return next(_difference(a, b) for a, b in zip(found, wanted, strict=True) if a != b)
    return f"{str(found)[:100]} for {str(wanted)[:100]}"


def _plan_state(folder: Path) -> tuple[Any, ...]:
    plan = BitRankPlan.from_pretrained(folder)
    calibration = plan.calibration
    return plan.to_metadata(), None if calibration is None else calibration.digest


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value
