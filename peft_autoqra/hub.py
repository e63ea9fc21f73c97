"""Pushing a folder to the hub: what it is, whether it is whole, and which of its files belong to it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from peft_autoqra.errors import AutoQRAError, InvalidPlanError
from peft_autoqra.hub_repository import PushTarget, opened
from peft_autoqra.plan import ADAPTER_FILE, PLAN_FILE, BitRankPlan, read_plan_header
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, CALIBRATION_FILE
from peft_autoqra.search_result import PLAN_FOLDER, RESULT_FILE
from peft_autoqra.streaming.quant_config import METHOD, AutoQRAQuantConfig
from peft_autoqra.tuner.config import AutoQRAConfig

PLAN, ADAPTER, QUANTIZED_BASE = "plan", "adapter", "quantized base"

_CARD_FILE = "README.md"
_ADAPTER_CONFIG, _MODEL_CONFIG = "adapter_config.json", "config.json"
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE_ALL = (_CARD_FILE, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_BESIDE_MODELS = (  # tokenizers, processors, generation
    "added_tokens.json", "additional_chat_templates/*.jinja", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.tiktoken",
)  # fmt: skip
_PICTURE = re.compile(r"""(?:\]\(|src=["'])([^)"'\s:]+\.(?:png|svg|jpe?g|gif|webp))""", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class SharedFolder:
    """A folder that was found whole.

    Attributes:
        path: of the folder.
        kinds: what lies in it: ``"plan"``, ``"adapter"``, ``"quantized base"``, or several.
        filenames: what belongs to that, relative to the folder, with forward slashes.
        left_out: names of everything else at its top.
        warnings: what a receiver would stumble over, with remedies.
    """

    path: Path
    kinds: tuple[str, ...]
    filenames: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def file_bytes(self) -> dict[str, int]:
        """File name to its size in bytes."""
        return {name: (self.path / name).stat().st_size for name in self.filenames}


def inspect_folder(path: str | Path) -> SharedFolder:
    """Recognize and check what lies in a folder; nothing goes over the network.

    Args:
        path: as written by ``save_pretrained`` of a plan, an adapter or a quantized model, or by a trainer.

    Raises:
        InvalidPlanError: nothing to share, or something damaged or incomplete.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidPlanError(f"There is no folder {folder}.")
    _refuse_search(folder)
    parts = {PLAN: _plan_files(folder), ADAPTER: _adapter_files(folder), QUANTIZED_BASE: _base_files(folder)}
    kinds = tuple(kind for kind, names in parts.items() if names)
    if not kinds:
        raise InvalidPlanError(_nothing_to_share(folder))
    _check_card(folder)
    patterns = _BESIDE_ALL if kinds == (PLAN,) else _BESIDE_ALL + _BESIDE_MODELS
    names = {name for files in parts.values() for name in files} | _matches(folder, patterns) | _pictures(folder)
    tops = {name.split("/")[0] for name in names}
    return SharedFolder(
        path=folder,
        kinds=kinds,
        filenames=tuple(sorted(names)),
        left_out=tuple(sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name not in tops)),
        warnings=tuple(_warnings(folder, kinds)),
    )


def push_folder(shared: SharedFolder, target: PushTarget, commit_message: str | None = None) -> CommitInfo:
    """Upload the files of a folder in one commit; repository and branch are made where missing.

    Args:
        shared: what :func:`inspect_folder` found.
        target: repository, branch, token.
        commit_message: first line of the commit; what is uploaded by default.

    Returns:
        The URL of the commit, with ``pr_url`` where a pull request was opened.

    Raises:
        HubError: no token, no right to write there, or a connection that failed. What was not committed is not visible
            on the hub.
    """
    with opened(target) as repository:
        return repository.commit(
            shared.path, shared.filenames, commit_message or f"Upload {' and '.join(shared.kinds)}"
        )


def _refuse_search(folder: Path) -> None:
    plan = folder / PLAN_FOLDER
    if (plan / PLAN_FILE).is_file() and (folder / RESULT_FILE).is_file():
        raise InvalidPlanError(
            f"{folder} is the directory of a search, with its log and caches; push the plan in it, {plan}, or the "
            "adapter that was trained with it."
        )


def _nothing_to_share(folder: Path) -> str:
    if (folder / _MODEL_CONFIG).is_file():
        return f"{folder} holds a model that AutoQRA did not quantize; push it with transformers (model.push_to_hub)."
    inner = sorted(f"{p.name}" for p in folder.iterdir() if any((p / f).is_file() for f in (PLAN_FILE, ADAPTER_FILE)))
    hint = f" Did you mean {folder / inner[0]}?" if inner else ""
    return f"{folder} holds no plan ({PLAN_FILE}), adapter ({ADAPTER_FILE}) or quantized model.{hint}"


# ---------------------------------------------------------------------------------------------------------- the kinds
def _plan_files(folder: Path) -> list[str]:
    if not (folder / PLAN_FILE).is_file():
        return []
    plan = BitRankPlan.from_pretrained(folder)
    return [PLAN_FILE, *([CALIBRATION_FILE] if plan.calibration is not None else [])]


def _adapter_files(folder: Path) -> list[str]:
    there = [name for name in (_ADAPTER_CONFIG, ADAPTER_FILE) if (folder / name).is_file()]
    if not there:
        return []
    if len(there) == 1:
        missing = ({_ADAPTER_CONFIG, ADAPTER_FILE} - set(there)).pop()
        raise InvalidPlanError(f"{missing} is missing beside {folder / there[0]}; save the adapter again.")
    config = _read_adapter_config(folder)
    _check_adapter(folder / ADAPTER_FILE)
    return [*there, *([ADAPTER_CALIBRATION_FILE] if config.calibration is not None else [])]


def _read_adapter_config(folder: Path) -> AutoQRAConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except AutoQRAError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidPlanError(
            f"{folder / _ADAPTER_CONFIG} cannot be read ({error}); save the adapter again."
        ) from error
    if not isinstance(config, AutoQRAConfig):
        raise InvalidPlanError(
            f"{folder} holds an adapter of {config.peft_type} that AutoQRA did not make; push it with PEFT "
            "(model.push_to_hub)."
        )
    return config


def _check_adapter(path: Path) -> None:
    """Every module with a rank has its adapter, and of that rank, where the file says which."""
    header, shapes = read_plan_header(path), _tensor_shapes(path)
    if "autoqra_plan" not in header:  # transformers' own way of saving adapters leaves it out
        return
    for name, layer in BitRankPlan.from_metadata(header, str(path)).items():
        adapter = {key: shape for key, shape in shapes.items() if key.startswith(f"base_model.model.{name}.lora_")}
        ranks = {shape[0] for key, shape in adapter.items() if key.endswith("lora_A.weight")}
        if bool(adapter) != bool(layer.rank) or ranks - {layer.rank}:
            raise InvalidPlanError(
                f"The adapter of {name!r} in {path} is not of rank {layer.rank}, as its plan says; save it again."
            )


def _base_files(folder: Path) -> list[str]:
    config = _read_json(folder / _MODEL_CONFIG) if (folder / _MODEL_CONFIG).is_file() else {}
    settings = config.get("quantization_config") or {}
    if settings.get("quant_method") != METHOD:
        return []
    if not AutoQRAQuantConfig(**settings).modules:
        raise InvalidPlanError(f"{folder / _MODEL_CONFIG} lists no quantized modules; save the model again.")
    if (folder / _WEIGHTS).is_file():
        _tensor_shapes(folder / _WEIGHTS)
        return [_MODEL_CONFIG, _WEIGHTS]
    if not (folder / _WEIGHTS_INDEX).is_file():
        raise InvalidPlanError(f"There is no {_WEIGHTS} in {folder}; save the model again.")
    shards = _check_shards(folder, _read_json(folder / _WEIGHTS_INDEX).get("weight_map") or {})
    return [_MODEL_CONFIG, _WEIGHTS_INDEX, *shards]


def _check_shards(folder: Path, weight_map: dict[str, str]) -> list[str]:
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise InvalidPlanError(f"{shard} is missing beside {folder / _WEIGHTS_INDEX}; save the model again.")
        expected = {name for name, where in weight_map.items() if where == shard}
        if expected != _tensor_shapes(folder / shard).keys():
            raise InvalidPlanError(f"{folder / shard} holds other tensors than its index says; save the model again.")
    return shards


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape; that the header can be read says that the file is as long as it should be."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 -- no mapping
    except SafetensorError as error:
        raise InvalidPlanError(f"{path} is damaged ({error}); save it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidPlanError(f"{path} cannot be read ({error}); save the model again.") from error
    if not isinstance(content, dict):
        raise InvalidPlanError(f"{path} must hold a JSON object; save the model again.")
    return content


# ---------------------------------------------------------------------------------------------------- what lies beside
def _matches(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    return {p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern) if p.is_file()}


def _pictures(folder: Path) -> set[str]:
    """Pictures in the folder that the model card shows."""
    card = folder / _CARD_FILE
    if not card.is_file():
        return set()
    links = {link.removeprefix("./") for link in _PICTURE.findall(card.read_text(encoding="utf-8"))}
    return {link for link in links if (folder / link).is_file() and ".." not in Path(link).parts}


def _check_card(folder: Path) -> None:
    """The hub refuses a card whose header it cannot read, or that names a folder as its base model."""
    card = folder / _CARD_FILE
    if not card.is_file():
        return
    try:
        named = ModelCard.load(card).data.base_model
    except (ValueError, TypeError, YAMLError) as error:
        raise InvalidPlanError(f"The header of {card} cannot be read ({error}); mend or delete it.") from error
    for name in [named] if isinstance(named, str) else named or []:
        if not _may_be_on_hub(name):
            raise InvalidPlanError(
                f"{card} names base_model {name!r} in its header, and the hub takes names of repositories only; put "
                "the base model's hub id there, or delete the line."
            )


def _warnings(folder: Path, kinds: tuple[str, ...]) -> list[str]:
    found = []
    if ADAPTER in kinds:
        base = _read_json(folder / _ADAPTER_CONFIG).get("base_model_name_or_path")
        if not _may_be_on_hub(base):
            found.append(
                f"{_ADAPTER_CONFIG} says base_model_name_or_path={base!r}, which others do not have; put the base "
                "model's hub id there."
            )
    if PLAN in kinds:
        plan = BitRankPlan.from_metadata(read_plan_header(folder / PLAN_FILE), str(folder))
        base = plan.base_model.name_or_path
        if base is not None and not _may_be_on_hub(base):
            found.append(
                f"The plan says that its base model is {base!r}, which others do not have; save it with the hub id: "
                "plan.replace(base_model=dataclasses.replace(plan.base_model, name_or_path=...))."
            )
    return found


def _may_be_on_hub(name: Any) -> bool:
    """Whether a base model's name means something elsewhere; a folder's does not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and not Path(name).exists()
