"""What went wrong on the hub, told with the repository, the cause and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from httpx2 import HTTPError
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peft_autoqra.errors import AutoQRAError, HubError

_LOG_IN = "log in with `hf auth login` or give a token"


@dataclass(frozen=True, kw_only=True)
class HubRequest:
    """What is asked of the hub, for messages.

    Attributes:
        repo_id: as the user gave it.
        action: ``"read"`` or ``"push"``.
        revision: branch, tag or commit; None for the main branch.
        filename: where one file is read.
    """

    repo_id: str
    action: Literal["read", "push"] = "read"
    revision: str | None = None
    filename: str | None = None

    def __str__(self) -> str:
        """Such as ``reading config.json of 'me/model'``."""
        if self.action == "push":
            return f"pushing to {self.repo_id!r}"
        return f"reading {f'{self.filename} of ' if self.filename else ''}{self.repo_id!r}"


@contextmanager
def hub_errors(request: HubRequest) -> Iterator[None]:
    """Turn the errors of the hub's client into ours; others, such as a full disk, pass unchanged.

    Raises:
        HubError: with the repository, the cause and the remedy.
    """  # noqa: DOC501 -- it raises nothing else of its own
    try:
        yield
    except AutoQRAError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        message = _explain(_cause_on_the_hub(error), request)
        if message is None:
            raise
        raise HubError(message) from error


def _cause_on_the_hub(error: BaseException) -> BaseException:
    """The client wraps some errors in others that say less."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, FileMetadataError)):
            return cause
        cause = cause.__cause__
    return error


def _explain(cause: BaseException, request: HubRequest) -> str | None:
    """The whole message; None for an error that is not the hub's."""
    if isinstance(cause, HFValidationError):
        return f"{request.repo_id!r} is no repository name; it has the form 'owner/name'."
    if isinstance(cause, HfHubHTTPError):
        return _explain_answer(cause, request)
    if isinstance(cause, LocalTokenNotFoundError):
        return f"There is no token for {request}; {_LOG_IN}."
    if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return _explain_offline(request)
    is_of_connection = isinstance(cause, (HTTPError, FileMetadataError))
    is_of_upload = isinstance(cause, RuntimeError) and str(cause).startswith("Error while uploading")  # by its threads
    if is_of_connection or is_of_upload or (isinstance(cause, OSError) and cause.errno is None):
        return f"The connection to the hub failed while {request} ({_in_one_line(cause)}). {_after_failure(request)}"
    return None


def _explain_answer(error: HfHubHTTPError, request: HubRequest) -> str:
    """For an answer of the hub other than success."""
    status, repo_id = error.response.status_code, request.repo_id
    sent_token = "authorization" in error.response.request.headers
    token = "with this token" if sent_token else "without a token"
    use_another = "use a token that has" if sent_token else f"{_LOG_IN} that has"
    if isinstance(error, GatedRepoError):
        return f"{repo_id!r} is gated: ask for access on its page, then {_LOG_IN} of that account."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id!r} has no revision {request.revision!r}; give one of its branches or tags, or a full commit."
    if isinstance(error, RepositoryNotFoundError) and request.action == "read":
        return (
            f"{repo_id!r} is neither a folder here nor a repository that the hub shows {token}. Check the spelling; "
            f"if it is private, {use_another} access to it."
        )
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        right = "write access to it" if request.action == "push" else "access to it"
        return f"The hub refuses {request} {token} ({_answer(error)}); {use_another} {right}."
    if status == 429 or status >= 500:
        return f"The hub failed while {request} ({_answer(error)}). {_after_failure(request)}"
    return f"The hub refuses {request} ({_answer(error)})."


def _explain_offline(request: HubRequest) -> str:
    if request.action == "push":
        return f"Offline mode is on, so {request} is not possible; unset HF_HUB_OFFLINE."
    at = f" at revision {request.revision!r}" if request.revision else ""
    return (
        f"{request.filename or 'Something'} of {request.repo_id!r}{at} is not in the cache, and downloads are "
        "switched off. Load it once with HF_HUB_OFFLINE unset and local_files_only=False, or give the cache_dir that "
        "holds it."
    )


def _after_failure(request: HubRequest) -> str:
    if request.action == "push":
        return "What was not committed is not visible there; push again."
    return "Nothing incomplete was kept; check the connection and try again."


def _answer(error: HfHubHTTPError) -> str:
    detail = error.server_message or error.response.reason_phrase
    return f"{error.response.status_code}: {' '.join(detail.split())}"


def _in_one_line(cause: BaseException) -> str:
    return " ".join(str(cause).split()) or type(cause).__name__
