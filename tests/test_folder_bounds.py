"""Which files belong to a folder."""

from __future__ import annotations

from pathlib import Path

from peft_autoqra.folder_bounds import belongs_to


def test_files_and_links_inside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("")
    (folder / "link").symlink_to("inner/file")
    (tmp_path / "elsewhere").symlink_to(folder)
    for root in (folder, tmp_path / "elsewhere"):
        assert all(belongs_to(root, name) for name in ("inner/file", "link", "not there", root / "link"))


def test_whatever_lies_outside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "folder2").write_text("")
    (folder / "link").symlink_to(tmp_path / "folder2")
    (folder / "all").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    for name in ("../folder2", tmp_path / "folder2", "link", "all/folder2", "circle"):
        assert not belongs_to(folder, name)


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--plan"
    snapshot = repository / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("")
    (snapshot / "ours").symlink_to("../../blobs/abc")
    (snapshot / "other").symlink_to("../../../models--me--other/blobs/abc")
    assert belongs_to(snapshot, "ours")
    assert not belongs_to(snapshot, "other")
