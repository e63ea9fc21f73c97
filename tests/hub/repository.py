"""Repositories in memory, with commits, branches, tags and pull requests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".model")
LFS_SIZE_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class StoredFile:
    """Content of one file; large and binary ones live in large file storage."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares a local file with: SHA-256 in large file storage, else git's hash of a blob."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    sha: str
    parent: str | None
    message: str
    author: str
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    """A model repository with its history; a new one holds ``.gitattributes`` alone, as on the hub."""

    name: str
    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._add("main", None, "initial commit", self.owner, {".gitattributes": StoredFile(b"* -text\n", lfs=False)})

    @property
    def num_pull_requests(self) -> int:
        return sum(ref.startswith("refs/pr/") for ref in self.refs)

    def find(self, revision: str) -> Commit | None:
        """By branch, tag, ``refs/pr/1`` or commit."""
        return self.commits.get(self.refs.get(revision, revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content, without ``.gitattributes``."""
        commit = self.find(revision)
        assert commit is not None, f"no revision {revision}"
        return {path: file.content for path, file in commit.files.items() if path != ".gitattributes"}

    def commit(self, ref: str, message: str, author: str, changes: Mapping[str, StoredFile | None]) -> Commit:
        """Add to an existing branch; None removes a file."""
        parent = self.commits[self.refs[ref]]
        merged = {**parent.files, **changes}
        return self._add(ref, parent.sha, message, author, {p: f for p, f in merged.items() if f is not None})

    def open_pull_request(self, base: str) -> str:
        """A new ref that starts at a branch."""
        ref = f"refs/pr/{self.num_pull_requests + 1}"
        self.refs[ref] = self.refs[base]
        return ref

    def _add(self, ref: str, parent: str | None, message: str, author: str, files: dict[str, StoredFile]) -> Commit:
        summary = repr((self.name, len(self.commits), parent, message, sorted((p, f.oid) for p, f in files.items())))
        commit = Commit(hashlib.sha1(summary.encode()).hexdigest(), parent, message, author, files)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit
