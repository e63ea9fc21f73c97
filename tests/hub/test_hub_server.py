"""The test server answers the real client as the hub does."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.conftest import ME, OTHER, Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    return folder


def test_what_is_uploaded_comes_back_at_every_revision(hub: Hub, folder: Path) -> None:
    api = HfApi()
    assert api.whoami()["name"] == "me"
    assert api.create_repo("model").repo_id == "me/model"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/model")
    api.create_repo("me/model", exist_ok=True)
    first = api.upload_folder(repo_id="me/model", folder_path=folder, commit_message="one")
    api.create_tag("me/model", tag="v1")
    api.create_branch("me/model", branch="feature/x")
    (folder / "config.json").write_text('{"a": 2}')
    second = api.upload_folder(repo_id="me/model", folder_path=folder, revision="feature/x")
    for revision, content in {"main": 1, "v1": 1, first.oid: 1, "feature/x": 2, second.oid: 2}.items():
        path = Path(hf_hub_download("me/model", "config.json", revision=revision))
        assert path.read_text() == f'{{"a": {content}}}'
    assert api.list_repo_files("me/model") == [".gitattributes", "config.json", "model.safetensors"]
    assert [info.path for info in api.get_paths_info("me/model", ["config.json"])] == ["config.json"]
    assert api.repo_info("me/model", revision="v1").sha == first.oid
    weights = Path(snapshot_download("me/model"), "model.safetensors")
    assert weights.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert weights.resolve().name == hub.server.repository("me/model").find("main").files["model.safetensors"].oid
    storage = [request for request in hub.server.requests() if request.host != "huggingface.co"]
    assert {request.line.split()[0] for request in storage} == {"PUT", "GET"}
    assert all(request.status in (200, 206) for request in storage)


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, folder: Path) -> None:
    api = HfApi(token=OTHER)
    HfApi(token=ME).create_repo("me/model")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api.upload_folder(repo_id="me/model", folder_path=folder)
    info = api.upload_folder(repo_id="me/model", folder_path=folder, create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    repository = hub.server.repository("me/model")
    assert (repository.files("main"), len(repository.files("refs/pr/1"))) == ({}, 2)


def test_errors_are_those_of_the_hub(hub: Hub, folder: Path) -> None:
    api = HfApi()
    for name in ("private", "gated", "open"):
        api.create_repo(f"me/{name}", private=name == "private")
    hub.server.repository("me/gated").gated = True
    cases = [
        ("me/private", OTHER, None, RepositoryNotFoundError, 404),
        ("me/private", False, None, RepositoryNotFoundError, 401),
        ("me/missing", ME, None, RepositoryNotFoundError, 404),
        ("me/gated", OTHER, None, GatedRepoError, 403),
        ("me/open", OTHER, "v9", RevisionNotFoundError, 404),
        ("me/open", False, None, RemoteEntryNotFoundError, 404),
        ("me/open", "hf_expired", None, HfHubHTTPError, 401),
    ]
    for name, token, revision, error, status in cases:
        with pytest.raises(error) as raised:
            hf_hub_download(name, "config.json", token=token, revision=revision)
        assert raised.value.response.status_code == status


def test_a_download_that_is_cut_goes_on_where_it_was(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what arrived of a chunk before the cut is lost
    HfApi().create_repo("me/model")
    HfApi().upload_folder(repo_id="me/model", folder_path=folder)
    fault = hub.server.fail(r"GET /[0-9a-f]{64}", "cut", times=2)
    path = Path(hf_hub_download("me/model", "model.safetensors"))
    assert path.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert fault.num_hits == 2
    assert [r.status for r in hub.server.requests("GET /[0-9a-f]{64}")] == [200, 206, 206]


def test_a_server_error_that_passes_is_tried_again(hub: Hub, folder: Path) -> None:
    faults = [hub.server.fail(r"PUT /", times=1), hub.server.fail(r"HEAD .*config.json", times=2)]
    HfApi().create_repo("me/model")
    HfApi().upload_folder(repo_id="me/model", folder_path=folder)
    assert Path(hf_hub_download("me/model", "config.json")).read_text() == '{"a": 1}'
    assert [fault.num_hits for fault in faults] == [1, 2]


def test_a_commit_on_an_older_state_is_refused(hub: Hub, folder: Path) -> None:
    api = HfApi()
    api.create_repo("me/model")
    first = api.upload_folder(repo_id="me/model", folder_path=folder).oid
    (folder / "config.json").write_text("{}")
    api.upload_folder(repo_id="me/model", folder_path=folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_folder(repo_id="me/model", folder_path=folder, parent_commit=first)


def test_metadata_of_a_card_are_checked(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    HfApi().create_repo("me/model")
    with pytest.raises(ValueError, match="base_model"):
        HfApi().upload_folder(repo_id="me/model", folder_path=folder)
