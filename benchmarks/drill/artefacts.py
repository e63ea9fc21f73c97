"""Every kind of file that a search, a fine-tune and a saved base leave, with the way it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from peft_autoqra import AutoQRAQuantConfig
from peft_autoqra.checkpoints import find_checkpoint
from peft_autoqra.evaluated_model import EvaluatedModel
from peft_autoqra.importance.bank_store import BankStore
from peft_autoqra.importance.statistics import StatisticsStore
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.recipe import ModelArguments
from peft_autoqra.recipe_inputs import load_base_model
from peft_autoqra.registration import register
from peft_autoqra.report_data import read_report_data
from peft_autoqra.trial_log import TrialLog


class Refused:
    """A kept calibration was not taken; it is made again, without an error."""


@dataclass(frozen=True)
class Artefact:
    """One file.

    Attributes:
        name: what it is.
        path: of the file.
        read: gives a value to compare, as the package reads the file.
        has_checksum: whether its format has one over all it says; what PEFT and transformers write has none.
        is_slow: a model is built to read it.
        is_prefix: whether what was read is a beginning of what was there, where that is promised.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    has_checksum: bool = True
    is_slow: bool = False
    is_prefix: Callable[[Any, Any], bool] | None = None


def make_quantized_base(flags: tuple[str, ...], folder: Path) -> None:
    """Save the model in 3 bits."""
    register()
    name = flags[flags.index("--model_name_or_path") + 1]
    config = AutoQRAQuantConfig(bits=3)
    AutoModelForCausalLM.from_pretrained(name, quantization_config=config).save_pretrained(folder)


def find_artefacts(search: Path, training: Path, base: Path) -> list[Artefact]:
    """All of them.

    Args:
        search: directory of a finished search.
        training: directory of a finished fine-tune with checkpoints.
        base: folder of a quantized base.
    """
    register()
    return [*_of_search(search), *_of_calibration(search / "calibration"), *_of_training(training), _of_base(base)]


def _of_search(search: Path) -> list[Artefact]:
    log = search / "trials.jsonl"
    identity = json.loads(log.read_bytes().split(b"\n")[0])["identity"]
    plan, report = partial(_plan, search / "plan"), partial(_report, search)
    return [
        Artefact("plan", search / "plan" / "autoqra_plan.safetensors", plan),
        Artefact("calibration of a plan", search / "plan" / "autoqra_calibration.safetensors", plan),
        Artefact("trial log, going on", log, lambda: TrialLog(log, identity).events, is_prefix=_is_prefix),
        Artefact("trial log, report", log, report, is_prefix=_has_fewer_trials),
        Artefact("search result", search / "search_result.json", report),
    ]


def _of_calibration(calibration: Path) -> list[Artefact]:
    entry = sorted(calibration.glob("bank-*/*bit/*.safetensors"))[0]
    name, bits = unquote(entry.stem), int(entry.parent.name.removesuffix("bit"))
    part = sorted(calibration.glob("*/part-*.safetensors"))[0]
    return [
        Artefact("calibration bank", entry, partial(_bank_entry, entry.parents[1], name, bits)),
        Artefact("calibration statistics", part, partial(_statistics, part, _names_of(part))),
    ]


def _of_training(training: Path) -> list[Artefact]:
    checkpoint = max(training.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    read_adapter, read_checkpoint = partial(_adapter, training), partial(_checkpoint, checkpoint)
    slow = partial(Artefact, read=read_adapter, is_slow=True)
    names = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    names += ("adapter_config.json", "autoqra_adapter_calibration.safetensors", "autoqra_checkpoint.json")
    return [
        slow("adapter", training / "adapter_model.safetensors", has_checksum=False),
        slow("adapter_config.json", training / "adapter_config.json", has_checksum=False),
        slow("calibration of an adapter", training / "autoqra_adapter_calibration.safetensors"),
        *(Artefact(f"checkpoint, {name}", checkpoint / name, read_checkpoint) for name in names),
    ]


def _of_base(base: Path) -> Artefact:
    def read() -> str:
        args = SFTConfig(output_dir=str(base), use_cpu=True, bf16=False)
        return _digest(load_base_model(ModelArguments(model_name_or_path=str(base)), args).state_dict())

    return Artefact("quantized base", base / "model.safetensors", read, has_checksum=False, is_slow=True)


def _plan(folder: Path) -> Any:
    plan = BitRankPlan.from_pretrained(folder)
    return plan.to_metadata(), None if plan.calibration is None else plan.calibration.digest


def _report(search: Path) -> Any:
    return read_report_data(search)


def _is_prefix(found: list[Any], wanted: list[Any]) -> bool:
    return wanted[: len(found)] == found


def _has_fewer_trials(found: Any, wanted: Any) -> bool:
    return bool(wanted.trials[: len(found.trials)] == found.trials)


def _bank_entry(folder: Path, name: str, bits: int) -> Any:
    entry = BankStore(folder).get(name, bits)
    if entry is None:
        return Refused()
    weight, correction = entry.weight, entry.correction
    tensors = [weight.codes, weight.scale_codes, weight.scale_base, torch.from_numpy(entry.rises)]
    arrays = [correction.left, correction.right, entry.input_second_moment]
    return weight.format, _digest(dict(enumerate([*tensors, *map(torch.from_numpy, arrays)])))


def _statistics(part: Path, names: tuple[str, ...]) -> Any:
    fingerprint = part.parent.name.split("-")[-1]
    statistics = StatisticsStore(part.parent, fingerprint).load(names)
    if statistics is None:
        return Refused()
    return _digest({f"{name} {i}": tensor for name in names for i, tensor in enumerate(_tensors(statistics[name]))})


def _names_of(part: Path) -> tuple[str, ...]:
    return tuple(sorted({key.partition(":")[2] for key in load_file(part)}))


def _tensors(statistics: Any) -> tuple[Tensor, ...]:
    return statistics.input_gram, statistics.output_gradient_second_moment, torch.tensor(statistics.num_tokens)


def _adapter(folder: Path) -> str:
    args = ModelArguments()
    with EvaluatedModel.find(str(folder), args).loaded(args, SFTConfig(use_cpu=True, bf16=False)) as model:
        scalings = {name: m.scaling for name, m in model.named_modules() if hasattr(m, "scaling")}
        return _digest(model.state_dict()) + json.dumps(scalings, sort_keys=True)


def _checkpoint(folder: Path) -> Mapping[str, str]:
    found = find_checkpoint(SFTConfig(output_dir=str(folder.parent), resume_from_checkpoint=str(folder), bf16=False))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(str(found)).iterdir())}


def _digest(tensors: Mapping[Any, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
