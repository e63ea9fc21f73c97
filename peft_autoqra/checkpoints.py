"""Checkpoints of a fine-tune: which one to go on from, and whether it is of the same quantized weights."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zipfile
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from trl import SFTConfig

from peft_autoqra.errors import PlanMismatchError
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE
from peft_autoqra.recipe import RecipeError
from peft_autoqra.replaced_file import replaced_file


def find_checkpoint(args: SFTConfig) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` asks for.

    True means the last one in the output directory that is whole; a run that was killed may leave one that is not.

    Raises:
        RecipeError: it is not there, or not whole.
    """
    wanted = str(args.resume_from_checkpoint)
    if wanted.lower() in ("none", "false"):
        return None
    if wanted.lower() == "true":
        return _last_checkpoint(Path(args.output_dir))
    defect = _defect(Path(wanted))
    if defect is not None:
        raise RecipeError(f"resume_from_checkpoint: {wanted} {defect}; name another one, or leave it out.")
    return wanted


def forget_contents(checkpoint: Path) -> None:
    """Before anything of a checkpoint is written again."""
    (checkpoint / CONTENTS_FILE).unlink(missing_ok=True)


def note_contents(checkpoint: Path) -> None:
    """Write the checksums of what a run goes on from, and one process writes, beside it."""
    files = [path for path in (checkpoint / name for name in (*_FILES, *_FURTHER_FILES)) if path.is_file()]
    with replaced_file(checkpoint / CONTENTS_FILE) as partial:
        partial.write_text(json.dumps({path.name: _checksum(path) for path in files}, indent=2), encoding="utf-8")


def checkpoint_plan(checkpoint: str, plan: BitRankPlan) -> BitRankPlan:
    """What a checkpoint was trained with.

    Args:
        checkpoint: its folder.
        plan: what is to be trained further; only its bits, ranks and quantizer are compared.

    Raises:
        PlanMismatchError: they are others, so that the adapters would not fit the quantized weights.
        InvalidPlanError: it holds no plan, or a damaged one.
    """
    saved = BitRankPlan.from_pretrained(checkpoint)
    if dict(saved) != dict(plan) or saved.quantizer != plan.quantizer:
        raise PlanMismatchError(
            f"resume_from_checkpoint: {checkpoint} was trained with other bits, ranks or modules, or another "
            "quantizer. Give what it was trained with, or leave it out."
        )
    return saved


def check_checkpoint(checkpoint: str, plan: BitRankPlan) -> None:
    """See whether a checkpoint's adapters were trained on the weights that a plan gives.

    Raises:
        PlanMismatchError: they were not.
        InvalidPlanError: it holds no plan, or a damaged one.
    """
    saved = checkpoint_plan(checkpoint, plan).calibration
    wanted = None if plan.calibration is None else plan.calibration.without_corrections()
    if (saved and saved.digest) != (wanted and wanted.digest):
        raise PlanMismatchError(
            f"resume_from_checkpoint: {checkpoint} was trained with another calibration, that is, on other quantized "
            "weights. Give the plan that it was trained with, or leave it out."
        )


def _last_checkpoint(directory: Path) -> str:
    paths = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(paths, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        defect = _defect(path)
        if defect is None:
            return str(path)
        warnings.warn(f"{path} {defect}, and is passed over.", stacklevel=2)
    raise RecipeError(f"resume_from_checkpoint: there is no checkpoint in {directory}; leave it out.")


def _defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None for nothing."""
    if not checkpoint.is_dir():
        return "is no folder of a checkpoint, such as adapter/checkpoint-500"
    for name, is_whole in _FILES.items():
        if not (checkpoint / name).is_file():
            return f"lacks {name}"
        if not is_whole(checkpoint / name):
            return f"has a damaged {name}"
    return _changed(checkpoint)


def _changed(checkpoint: Path) -> str | None:
    """What is other than noted; one of a run that was killed just then, or of another trainer, has no note."""
    note = checkpoint / CONTENTS_FILE
    if not note.is_file():
        return None
    try:
        checksums = dict(json.loads(note.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        return f"has a damaged {CONTENTS_FILE}"
    for name, checksum in checksums.items():
        path = checkpoint / name
        if path.name != name or not path.is_file() or _checksum(path) != checksum:
            return f"has another {name} than was written (delete {CONTENTS_FILE} to take it as it is)"
    return None


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _is_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


CONTENTS_FILE = "autoqra_checkpoint.json"
_CHUNK_BYTES = 2**20
_FILES = {
    TRAINER_STATE_NAME: _is_json,
    SAFETENSORS_WEIGHTS_NAME: _is_safetensors,
    OPTIMIZER_NAME: zipfile.is_zipfile,  # torch.save's format, whose directory stands at the end
    SCHEDULER_NAME: zipfile.is_zipfile,
}
"""What a run needs to go on, and how to see that a file was written to its end."""
_FURTHER_FILES = (CONFIG_NAME, ADAPTER_CALIBRATION_FILE, "rng_state.pth", SCALER_NAME)
