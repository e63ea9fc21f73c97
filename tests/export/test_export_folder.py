"""The folder of an export appears as a whole and replaces nothing else."""

from pathlib import Path

import pytest

from peft_autoqra.errors import ExportError
from peft_autoqra.export.export_folder import MARKER_FILE, export_folder


def write(output_dir: Path, *names: str) -> None:
    with export_folder(output_dir, "gguf") as folder:
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_parents_are_made_and_nothing_else_is_left(tmp_path):
    write(tmp_path / "a" / "out", "one", "sub/two")
    assert files(tmp_path) == {"a/out/one", "a/out/sub/two", f"a/out/{MARKER_FILE}"}
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "one")
    assert "one" in files(tmp_path / "out")


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "out", "one", "sub/two")
    write(tmp_path / "out", "three")
    assert files(tmp_path) == {"out/three", f"out/{MARKER_FILE}"}


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "one")
    for output_dir in ("out", "new"):
        with pytest.raises(FileNotFoundError):
            write(tmp_path / output_dir, "two", "no/such/folder")
    assert files(tmp_path) == {"out/one", f"out/{MARKER_FILE}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("marker", [None, "", "[]", '{"files": 3}', '{"files": ["two"]}'])
def test_files_of_others_are_never_deleted(tmp_path, marker):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    if marker is not None:
        (tmp_path / "out" / MARKER_FILE).write_text(marker)
    with pytest.raises(ExportError, match="no earlier export wrote"):
        write(tmp_path / "out", "one")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_file_added_to_an_export_is_kept(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ExportError, match="mine"):
        write(tmp_path / "out", "two")
    assert files(tmp_path / "out") == {"one", "mine", MARKER_FILE}


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(ExportError, match="mine"):
        write(tmp_path / "out", "one", "../../out/mine")
    assert files(tmp_path) == {"out/mine"}


def test_the_working_directory_and_links_to_folders(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("linked")
    monkeypatch.chdir(tmp_path / "here")
    write(Path(), "one")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "here" / "one").exists()
    assert (tmp_path / "linked" / "two").exists()


def test_a_mount_point():
    with pytest.raises(ExportError, match="mount point"):
        write(Path("/"), "one")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ExportError, match="is a file"):
        write(tmp_path / "out", "one")
