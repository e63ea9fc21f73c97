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
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.folder_bounds import belongs_to

README = "README.md"
BEGIN = "<!-- autoqra: from here on peft-autoqra writes; what you change will be overwritten -->"
END = "<!-- autoqra: until here -->"

# What others may have written: other encodings, a header that is no YAML or no mapping, keys named like methods.
_UNUSABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError,
    yaml.YAMLError,
)  # fmt: skip
_MAX_BYTES = 2**20
_MAX_HEADER_LENGTH = 2**17  # of characters; parsing them takes a second
_MAX_HEADER_DEPTH = 32
_MAX_TAGS = 2**10
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


def read_card(path: Path) -> ModelCard:
    """Read a README.md that anyone may have written, in seconds at most.

    Raises:
        InvalidPlanError: no regular file of its folder, larger than any card, or with a header that cannot be read:
            aliases, by which a few lines stand for gigabytes, are refused too.
    """
    try:
        _check_file(path)
        _check_header(path.read_text(encoding="utf-8-sig"))
        return cast("ModelCard", ModelCard.load(path))
    except _UNUSABLE as error:
        raise InvalidPlanError(f"The header of {path} cannot be read ({error}); mend or delete it.") from error


def has_section(directory: Path) -> bool:
    """Whether a folder's README.md holds a section of :func:`update_readme`."""
    path = directory / README
    try:
        _check_file(path)
        return BEGIN in path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return False


def _check_file(path: Path) -> None:
    if not path.is_file():  # a pipe would keep the reader waiting for ever
        raise ValueError("it is no regular file")
    if not belongs_to(path.parent, path.name):
        raise ValueError("it is a link to a file outside of the folder")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it takes {path.stat().st_size} bytes, more than the {_MAX_BYTES} that are read")


def _check_header(text: str) -> None:
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return
    header = match.group(2)
    if len(header) > _MAX_HEADER_LENGTH:
        raise ValueError(f"it has {len(header)} characters, more than the {_MAX_HEADER_LENGTH} that are read")
    depth = 0
    for event in yaml.parse(header, Loader=yaml.SafeLoader):  # one by one, so that no bomb is built
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it uses the alias *{event.anchor[:20]}; write out what that stands for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_HEADER_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_HEADER_DEPTH} levels deep")
    _check_values(yaml.safe_load(header))


def _check_values(header: object) -> None:
    if not isinstance(header, dict):  # empty, or what ModelCard refuses
        return
    for key in ("base_model", "tags"):
        value = header.get(key)
        names = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(name, str) for name in names):
            raise ValueError(f"its {key} is neither text nor a list of texts")
        if len(names) > _MAX_TAGS:
            raise ValueError(f"it has {len(names)} {key}, more than the {_MAX_TAGS} that are read")


def _update(path: Path, title: str, section: str, metadata: HubMetadata) -> None:
    if path.exists():
        card = read_card(path)
    else:
        card = ModelCard(f"---\nlibrary_name: {metadata.library_name}\n---\n\n# {title}\n")
    _update_header(card, metadata)
    card.text = _with_section(card.text, section)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # a link would be written through
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
