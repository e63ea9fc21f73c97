"""README.md files that others write too: only our part of them is written, and written again."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

README = "README.md"
BEGIN = "<!-- autoqra: from here on peft-autoqra writes; what you change will be overwritten -->"
END = "<!-- autoqra: until here -->"

# What others may have written: no file but a folder, other encodings, a header that is no YAML or no mapping.
_UNUSABLE = (OSError, TypeError, ValueError, yaml.YAMLError)
_SECTION = re.compile(re.escape(BEGIN) + "(?:.*?" + re.escape(END) + ")?", re.DOTALL)
_LOCAL_BASE_TAG = "base_model:adapter:"


@dataclass(frozen=True, kw_only=True)
class HubMetadata:
    """Our keys of the YAML header, by which the hub finds and shows a repository.

    Attributes:
        library_name: that loads it.
        tags: added to those that are there.
        base_model: hub id, added where there is a list; None leaves what is there. Local folders, which the hub
            refuses, go.
        base_model_relation: what was made of the base model.
        pipeline_tag: the task, unless one is there; None where it is not certain.
    """

    library_name: Literal["peft", "transformers"]
    tags: tuple[str, ...]
    base_model: str | None
    base_model_relation: Literal["adapter", "quantized"]
    pipeline_tag: str | None = None


def hub_id(name_or_path: object) -> str | None:
    """The name if it can be one of a hub repository, and None for folders."""
    if not isinstance(name_or_path, str) or not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def update_readme(directory: Path, title: str, section: str, metadata: HubMetadata) -> None:
    """Put our section and our metadata into a README.md, and leave the rest as it is.

    A file that cannot be read or understood is left alone, with a warning: saving a model must not fail because of it.

    Args:
        directory: of the README.md, which is made where missing.
        title: heading of a new file.
        section: Markdown; takes the place of the section of an earlier call, or else goes before the first heading of
            second level.
        metadata: for the YAML header.
    """
    path = directory / README
    try:
        _update(path, title, section, metadata)
    except _UNUSABLE as error:
        reason = str(error).rstrip(".\n ")
        warnings.warn(
            f"{path} is left as it is and says nothing of the plan, since it cannot be updated: {reason}. Mend or "
            "delete it, and call peft_autoqra.complete_model_card on the folder.",
            stacklevel=2,
        )


def has_section(directory: Path) -> bool:
    """Whether a folder's README.md holds a section of :func:`update_readme`."""
    path = directory / README
    return path.is_file() and BEGIN in path.read_text(encoding="utf-8", errors="replace")


def _update(path: Path, title: str, section: str, metadata: HubMetadata) -> None:
    if path.exists():
        card = ModelCard.load(path)
    else:
        card = ModelCard(f"---\nlibrary_name: {metadata.library_name}\n---\n\n# {title}\n")
    _update_header(card, metadata)
    card.text = _with_section(card.text, section)
    partial = path.with_suffix(".partial")
    card.save(partial)
    partial.replace(path)  # at once: what others wrote must survive a full disk


def _update_header(card: ModelCard, metadata: HubMetadata) -> None:
    data = cast("ModelCardData", card.data)
    data.library_name = metadata.library_name
    data.base_model = _base_models(metadata.base_model, data.base_model)
    if data.base_model:
        data["base_model_relation"] = metadata.base_model_relation
    data.pipeline_tag = data.pipeline_tag or metadata.pipeline_tag
    tags = [tag for tag in data.tags or [] if not _names_folder(tag)]
    data.tags = tags + [tag for tag in metadata.tags if tag not in tags]


def _base_models(ours: str | None, there: object) -> str | list[str] | None:
    """A list is the user's, such as that of a merge, and is added to; a single name may be an earlier one of ours."""
    if not isinstance(there, list):
        return ours or hub_id(there)
    kept = [name for name in there if hub_id(name)]
    return kept + ([ours] if ours and ours not in kept else []) or None


def _names_folder(tag: object) -> bool:
    """PEFT tags adapters with their base model, even where that is a folder."""
    return isinstance(tag, str) and tag.startswith(_LOCAL_BASE_TAG) and not hub_id(tag[len(_LOCAL_BASE_TAG) :])


def _with_section(text: str, section: str) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    block = f"{BEGIN}\n{section}\n{END}".replace("\n", newline)
    if BEGIN in text:
        text = _SECTION.sub(lambda _: block, text, count=1)
    else:
        position = _first_subheading(text)
        before, after = text[:position].rstrip(), text[position:]
        text = newline + before.lstrip() + newline * 2 + block + (newline * 2 + after if after else "")
    return text.rstrip() + newline


def _first_subheading(text: str) -> int:
    """Where the first ``## `` outside of code stands, else the end."""
    position, in_code = 0, False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith(("```", "~~~")):
            in_code = not in_code
        elif line.startswith("## ") and not in_code:
            return position
        position += len(line)
    return position
