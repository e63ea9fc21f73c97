"""Pushing files to a repository of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from peft_autoqra.errors import HubError
from peft_autoqra.hub_errors import HubRequest, hub_errors


@dataclass(frozen=True, kw_only=True)
class PushTarget:
    """Where something is pushed to.

    Attributes:
        repo_id: ``"owner/name"``, or the name alone for a repository of one's own.
        revision: branch; None for the main one.
        private: of a repository that is made; None leaves it to the owner's settings.
        token: hub token; None for the one of ``hf auth login``.
        create_pr: open a pull request instead of committing to the branch.

    Raises:
        HubError: a pull request against another branch than the main one.
    """

    repo_id: str
    revision: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        """Refuse what the hub would."""
        if self.create_pr and self.revision not in (None, "main"):
            raise HubError(
                f"create_pr opens a pull request against the main branch of {self.repo_id!r}; leave out "
                f"revision={self.revision!r}, or push to that branch without create_pr."
            )


@dataclass(frozen=True, kw_only=True)
class HubRepository:
    """A repository that is there to be pushed to.

    Attributes:
        name: ``"owner/name"``.
        target: what it was opened for.
    """

    name: str
    target: PushTarget

    def commit(self, folder: Path, filenames: Iterable[str], message: str) -> CommitInfo:
        """Upload files of a folder in one commit, so that they appear together or not at all.

        Args:
            folder: local.
            filenames: relative to it, with forward slashes; the same in the repository.
            message: first line of the commit.

        Returns:
            The URL of the commit, with ``pr_url`` where a pull request was opened.
        """
        return HfApi(token=self.target.token).create_commit(
            self.name,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in filenames],
            commit_message=message,
            revision=self.target.revision,
            create_pr=self.target.create_pr,
        )


@contextmanager
def opened(target: PushTarget) -> Iterator[HubRepository]:
    """Make repository and branch where missing, and explain what goes wrong until the block ends.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    with hub_errors(HubRequest(repo_id=target.repo_id, action="push", revision=target.revision)):
        yield HubRepository(name=_prepare(target), target=target)


def _prepare(target: PushTarget) -> str:
    api = HfApi(token=target.token)
    repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
    if target.private and not api.repo_info(repo_id).private:
        raise HubError(
            f"{repo_id!r} exists and is public, so private=True would not hide what is pushed there; make it private "
            "in its settings, or choose another name."
        )
    if target.revision is not None and not target.create_pr and not target.revision.startswith("refs/"):
        api.create_branch(repo_id, branch=target.revision, exist_ok=True)
    return repo_id
