"""Finding one file in a folder or a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.hub_errors import HubRequest, hub_errors


def locate_file(filename: str, model_id: str, **hub_kwargs: Any) -> Path | None:
    """Path of a file in a folder or hub repository; None where it is not there.

    Args:
        filename: may hold slashes.
        model_id: folder or hub id.
        hub_kwargs: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only`` and others of
            ``huggingface_hub.hf_hub_download``.

    Raises:
        InvalidPlanError: neither a folder nor the name of a repository.
        HubError: the repository or revision does not exist, gives no access, cannot be reached, or is not in the cache
            where nothing may be downloaded.
    """
    if Path(model_id).is_dir():
        path = Path(model_id) / filename
        return path if path.is_file() else None
    if Path(model_id).is_file():
        raise InvalidPlanError(f"{model_id!r} is a file; give the folder that holds it.")
    with hub_errors(HubRequest(repo_id=model_id, revision=hub_kwargs.get("revision"), filename=filename)):
        return _download(filename, model_id, hub_kwargs)


def _download(filename: str, repo_id: str, hub_kwargs: dict[str, Any]) -> Path | None:
    """Path in the cache; the client's errors unchanged."""
    try:
        return Path(hf_hub_download(repo_id=repo_id, filename=filename, **hub_kwargs))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:
        if _is_known_to_be_missing(filename, repo_id, hub_kwargs):
            return None
        raise
    except HFValidationError as error:
        raise InvalidPlanError(
            f"{repo_id!r} is no folder here, and no repository of the hub, whose names have the form 'owner/name'; "
            "check the spelling."
        ) from error


def _is_known_to_be_missing(filename: str, repo_id: str, hub_kwargs: dict[str, Any]) -> bool:
    """Whether the hub said so before it could no longer be asked; the cache keeps that too."""
    where = {name: hub_kwargs[name] for name in ("cache_dir", "revision") if hub_kwargs.get(name) is not None}
    cached = try_to_load_from_cache(repo_id, filename, **where)
    return cached is not None and not isinstance(cached, str)
