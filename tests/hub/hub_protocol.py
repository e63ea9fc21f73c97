"""What the hub answers: the part of its HTTP protocol that sharing models needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.hub_state import HubState
from tests.hub.repository import LFS_SIZE_BYTES, LFS_SUFFIXES, Commit, Repository, StoredFile

STORAGE = "https://storage.hub.invalid"
"""Where large files live: another host, which no token must ever be sent to."""


class Refusal(Exception):
    """An answer other than success, with the headers that tell the client which error it is."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


class HubProtocol(BaseHTTPRequestHandler):
    """One request; who serves it has read ``query`` and ``body``."""

    state: HubState
    query: dict[str, str]
    body: bytes

    # ------------------------------------------------------------------------------------------------------- who asks
    def token(self) -> str | None:
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if kind == "Bearer" else None

    def _user(self) -> str | None:
        token = self.token()
        if token is not None and token not in self.state.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return None if token is None else self.state.tokens[token]

    def _readable(self, name: str) -> Repository:
        """Private repositories look like missing ones; without a token both are 401."""
        user = self._user()
        repository = self.state.repositories.get(name)
        if repository is None or (repository.private and user != repository.owner):
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def _open(self, name: str) -> Repository:
        """Of a gated repository everyone may know that it exists, and few may read the files."""
        repository = self._readable(name)
        if repository.gated and self._user() != repository.owner:
            status = 401 if self._user() is None else 403
            raise Refusal(status, f"Access to model {name} is restricted.", "GatedRepo")
        return repository

    def _writable(self, name: str, *, pull_request: bool = False) -> Repository:
        repository = self._readable(name)
        if self._user() is None:
            raise Refusal(401, "Invalid username or password.")
        if self._user() != repository.owner and not pull_request:
            raise Refusal(403, "Forbidden: you don't have write access to this repository")
        return repository

    @staticmethod
    def _commit_of(repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --------------------------------------------------------------------------------------------------------- routes
    def route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.headers["Host"] == urlsplit(STORAGE).netloc:
            return self._storage(path)
        for pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return handler(self, *map(unquote, match.groups()))
        self.state.unknown_requests.append(f"{self.command} {path}")
        raise Refusal(404, "Not found")

    def _whoami(self) -> tuple[int, dict[str, str], bytes]:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return _json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def _create(self) -> tuple[int, dict[str, str], bytes]:
        user = self._user()
        wanted = json.loads(self.body)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if (owner := wanted.get("organization") or user) != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.state.endpoint}/{name}", "name": name}
        if name in self.state.repositories:
            return _json({"error": "You already created this model repo", **url}, 409)
        self.state.repositories[name] = Repository(name, owner, private=wanted.get("visibility") == "private")
        return _json(url)

    def _validate_yaml(self) -> tuple[int, dict[str, str], bytes]:
        match = re.match(r"---\n(.*?)\n---(\n|$)", json.loads(self.body)["content"], re.DOTALL)
        try:
            header = yaml.safe_load(match.group(1)) if match else {}
        except yaml.YAMLError as error:
            return _json({"errors": [{"message": str(error)}], "error": "invalid", "warnings": []}, 400)
        base = (header or {}).get("base_model", "a/b")
        if not all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in ([base] if isinstance(base, str) else base)):
            message = '"base_model" with value "' + str(base) + '" is not valid. Use a model id'
            return _json({"errors": [{"message": message}], "error": message, "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def _info(self, name: str, revision: str = "main") -> tuple[int, dict[str, str], bytes]:
        repository = self._readable(name)
        commit = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        gated = "manual" if repository.gated else False
        about = {"id": name, "sha": commit.sha, "private": repository.private, "gated": gated, "siblings": siblings}
        return _json({**about, "author": repository.owner, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, name: str, revision: str, folder: str = "") -> tuple[int, dict[str, str], bytes]:
        commit = self._commit_of(self._open(name), revision)
        entries = [_entry(path, file) for path, file in commit.files.items() if path.startswith(folder)]
        if not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound", commit.sha)
        return _json(entries)

    def _paths_info(self, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        commit = self._commit_of(self._open(name), revision)
        wanted = parse_qs(self.body.decode())["paths"]
        return _json([_entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def _refs(self, name: str) -> tuple[int, dict[str, str], bytes]:
        refs = self._readable(name).refs
        kinds: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, sha in refs.items():
            if ref.startswith("refs/pr/"):
                kinds["pullRequests"].append({"name": ref, "ref": ref, "targetCommit": sha})
            else:
                kinds["branches"].append({"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha})
        return _json(kinds)

    def _branch(self, name: str, branch: str) -> tuple[int, dict[str, str], bytes]:
        repository = self._writable(name)
        start = self._commit_of(repository, json.loads(self.body or b"{}").get("startingPoint", "main"))
        if branch in repository.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.refs[branch] = start.sha
        return _json({})

    def _tag(self, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repository = self._writable(name)
        repository.refs[json.loads(self.body)["tag"]] = self._commit_of(repository, revision).sha
        return _json({})

    def _preupload(self, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repository = self._writable(name, pull_request="create_pr" in self.query)
        there = self._commit_of(repository, revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE_BYTES
            known = {"oid": there[file["path"]].oid} if file["path"] in there else {}
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return _json({"files": files})

    def _lfs_batch(self, name: str) -> tuple[int, dict[str, str], bytes]:
        self._writable(name, pull_request=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.state.large_files:
                verify = {"href": f"{self.state.endpoint}/api/models/{name}/lfs-verify"}
                answer["actions"] = {"upload": {"href": f"{STORAGE}/{wanted['oid']}"}, "verify": verify}
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, name: str) -> tuple[int, dict[str, str], bytes]:
        self._writable(name, pull_request=True)
        wanted = json.loads(self.body)
        if len(self.state.large_files.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "The large file is incomplete")
        return _json({})

    def _storage(self, path: str) -> tuple[int, dict[str, str], bytes]:
        oid = path.strip("/")
        if self.token() is not None:
            raise Refusal(400, "Only one auth mechanism allowed: the address is signed, and a token was sent too")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400, "The content does not have the announced hash")
            self.state.large_files[oid] = self.body
            return 200, {"ETag": f'"{oid}"'}, b""
        return self._ranged(self.state.large_files[oid], {"ETag": f'"{oid}"'})

    def _commit(self, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        pull_request = "create_pr" in self.query
        repository = self._writable(name, pull_request=pull_request)
        head, changes = {}, {}
        for item in map(json.loads, self.body.decode().splitlines()):
            if item["key"] == "header":
                head = item["value"]
            else:
                path = item["value"]["path"]
                changes[path] = self._changed_file(item["key"], item["value"])
        self._commit_of(repository, revision)
        if revision not in repository.refs:
            raise Refusal(400, f"{revision} is no branch")
        if head.get("parentCommit") not in (None, repository.refs[revision]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        ref = repository.open_pull_request(revision) if pull_request else revision
        commit = repository.commit(ref, head["summary"], str(self._user()), changes)
        url = f"{self.state.endpoint}/{name}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{repository.num_pull_requests}"
        return _json(answer)

    def _changed_file(self, key: str, value: dict[str, Any]) -> StoredFile | None:
        if key == "file":
            return StoredFile(base64.b64decode(value["content"]), lfs=False)
        if key == "lfsFile":
            if value["oid"] not in self.state.large_files:
                raise Refusal(400, f"LFS pointer of {value['path']} points to a file that does not exist")
            return StoredFile(self.state.large_files[value["oid"]], lfs=True)
        return None

    def _resolve(self, name: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        commit = self._commit_of(self._open(name), revision)
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.sha)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'}
        if not file.lfs:
            return self._ranged(file.content, headers)
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        return 302, {**headers, **linked, "Location": f"{STORAGE}/{file.oid}"}, b""

    def _ranged(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        headers = {**headers, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return 200, headers, content
        start, end = int(match.group(1)), int(match.group(2) or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return 206, headers, content[start : end + 1]


def _json(content: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _entry(path: str, file: StoredFile) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 128}
    return entry


_NAME = r"([\w.-]+/[\w.-]+)"
_API = rf"/api/models/{_NAME}"
_ROUTES: list[tuple[str, Callable[..., tuple[int, dict[str, str], bytes]]]] = [
    (r"GET /api/agent-harnesses", lambda _: _json({"standardEnvVars": [], "harnesses": {}})),
    (r"HEAD /api/telemetry/.*", lambda _: _json({})),
    (r"GET /api/whoami-v2", HubProtocol._whoami),
    (r"POST /api/repos/create", HubProtocol._create),
    (r"POST /api/validate-yaml", HubProtocol._validate_yaml),
    (rf"GET {_API}", HubProtocol._info),
    (rf"GET {_API}/revision/([^/]+)", HubProtocol._info),
    (rf"GET {_API}/tree/([^/]+)", HubProtocol._tree),
    (rf"GET {_API}/tree/([^/]+)/(.+)", HubProtocol._tree),
    (rf"POST {_API}/paths-info/([^/]+)", HubProtocol._paths_info),
    (rf"GET {_API}/refs", HubProtocol._refs),
    (rf"POST {_API}/branch/([^/]+)", HubProtocol._branch),
    (rf"POST {_API}/tag/([^/]+)", HubProtocol._tag),
    (rf"POST {_API}/preupload/([^/]+)", HubProtocol._preupload),
    (rf"POST {_API}/commit/([^/]+)", HubProtocol._commit),
    (rf"POST {_API}/lfs-verify", HubProtocol._lfs_verify),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", HubProtocol._lfs_batch),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", HubProtocol._resolve),
]
