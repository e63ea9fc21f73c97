"""Pushing a folder to the hub: what it is, and which of its files belong to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from peft_autoqra.beside_models import BESIDE_MODELS
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.folder_bounds import belongs_to
from peft_autoqra.folder_card import complete_model_card
from peft_autoqra.folder_contents import ADAPTER_CONFIG, MODEL_CONFIG, adapter_files, base_files, plan_files, read_json
from peft_autoqra.hub_repository import PushTarget, opened
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_file import ADAPTER_FILE, PLAN_FILE, read_header
from peft_autoqra.readme import README, read_card
from peft_autoqra.search_result import PLAN_FOLDER, RESULT_FILE

PLAN, ADAPTER, QUANTIZED_BASE = "plan", "adapter", "quantized base"

_BESIDE_ALL = (README, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_PICTURE = re.compile(r"""(?:\]\(|src=["'])([^()\[\]"'\s:]{1,255}\.(?:png|svg|jpe?g|gif|webp))""", re.IGNORECASE)


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


def prepare_folder(path: str | Path) -> SharedFolder:
    """Recognize and check what lies in a folder, and complete its model card; nothing goes over the network.

    Args:
        path: as written by ``save_pretrained`` of a plan, an adapter or a quantized model, or by a trainer.

    Raises:
        InvalidPlanError: nothing to share, something damaged or incomplete, or a link to a file elsewhere.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidPlanError(f"There is no folder {folder}.")
    _refuse_search(folder)
    parts = {PLAN: plan_files(folder), ADAPTER: adapter_files(folder), QUANTIZED_BASE: base_files(folder)}
    kinds = tuple(kind for kind, names in parts.items() if names)
    if not kinds:
        raise InvalidPlanError(_nothing_to_share(folder))
    patterns = _BESIDE_ALL if kinds == (PLAN,) else _BESIDE_ALL + BESIDE_MODELS
    names = {name for files in parts.values() for name in files} | _matches(folder, patterns)
    _refuse_links(folder, names)
    _card_base_models(folder)  # the header can be read
    complete_model_card(folder)
    _check_card(folder)
    names |= _matches(folder, (README,)) | _pictures(folder)
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
        shared: what :func:`prepare_folder` found.
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
    if (folder / MODEL_CONFIG).is_file():
        return f"{folder} holds a model that AutoQRA did not quantize; push it with transformers (model.push_to_hub)."
    inner = sorted(f"{p.name}" for p in folder.iterdir() if any((p / f).is_file() for f in (PLAN_FILE, ADAPTER_FILE)))
    hint = f" Did you mean {folder / inner[0]}?" if inner else ""
    return f"{folder} holds no plan ({PLAN_FILE}), adapter ({ADAPTER_FILE}) or quantized model.{hint}"


def _matches(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    return {p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern) if p.is_file()}


def _pictures(folder: Path) -> set[str]:
    """Pictures in the folder that the model card shows; nothing else that it may name."""
    card = folder / README
    if not card.is_file():
        return set()
    links = {link.removeprefix("./") for link in _PICTURE.findall(card.read_text(encoding="utf-8"))}
    return {link for link in links if _is_relative(link) and (folder / link).is_file() and belongs_to(folder, link)}


def _is_relative(link: str) -> bool:
    return not Path(link).is_absolute() and ".." not in Path(link).parts


def _refuse_links(folder: Path, names: set[str]) -> None:
    """Someone else may have made the folder, and a link in it would publish any file of this machine."""
    for name in sorted(names):
        if not belongs_to(folder, name):
            raise InvalidPlanError(
                f"{folder / name} is a link to {(folder / name).resolve()}, outside of the folder; copy the file here "
                "if it is to be public, or delete the link."
            )


def _check_card(folder: Path) -> None:
    """The hub refuses a card that names a folder as its base model."""
    for name in _card_base_models(folder):
        if not _may_be_on_hub(name):
            raise InvalidPlanError(
                f"{folder / README} names base_model {name!r} in its header, and the hub takes names of "
                "repositories only; put the base model's hub id there, or delete the line."
            )


def _card_base_models(folder: Path) -> list[str]:
    if not (folder / README).exists():
        return []
    named = read_card(folder / README).data.get("base_model")
    return [named] if isinstance(named, str) else named or []


def _warnings(folder: Path, kinds: tuple[str, ...]) -> list[str]:
    found = []
    if ADAPTER in kinds:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not _may_be_on_hub(base):
            found.append(
                f"{ADAPTER_CONFIG} says base_model_name_or_path={base!r}, which others do not have; put the base "
                "model's hub id there."
            )
    if PLAN in kinds:
        plan = BitRankPlan.from_metadata(read_header(folder / PLAN_FILE), str(folder))
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
