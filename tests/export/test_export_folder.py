"""The folder of an export appears as a whole and replaces nothing else."""

import errno
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


@pytest.mark.parametrize("mine", ["folder", "sub/folder", "broken", "to_file", "to_folder"])
def test_empty_folders_and_links_are_kept(tmp_path, mine):
    write(tmp_path / "out", "one", "sub/two")
    path = tmp_path / "out" / mine
    if path.name == "folder":
        path.mkdir()
    else:
        (tmp_path / "to_folder").mkdir()
        (tmp_path / "to_file").touch()
        path.symlink_to(tmp_path / mine)
    with pytest.raises(ExportError, match=f"no earlier export wrote, such as '{mine}'"):
        write(tmp_path / "out", "three")
    assert path.is_symlink() or path.is_dir()


def test_edited_files_of_an_export_are_replaced(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "one").write_text("edited")
    write(tmp_path / "out", "one")
    assert (tmp_path / "out" / "one").read_text() == "one"


@pytest.fixture
def renames_that_fail(monkeypatch) -> set[str]:
    """Names of what cannot be renamed, as where rights or file systems change in between."""
    names: set[str] = set()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name in names:
            raise PermissionError(errno.EACCES, "Permission denied", str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    return names


@pytest.mark.parametrize("name", ["new", "out"])
def test_an_earlier_export_is_put_back_where_it_cannot_be_replaced(tmp_path, renames_that_fail, name):
    write(tmp_path / "out", "one")
    renames_that_fail.add(name)
    with pytest.raises(ExportError, match="out cannot be replaced: Permission denied; it is as it was") as caught:
        write(tmp_path / "out", "two")
    assert ".out." not in str(caught.value)
    assert files(tmp_path) == {"out/one", f"out/{MARKER_FILE}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_that_cannot_be_put_back_is_kept_and_named(tmp_path, renames_that_fail):
    write(tmp_path / "out", "one")
    renames_that_fail |= {"new", "old"}
    with pytest.raises(ExportError, match="nor put back: Permission denied") as caught:
        write(tmp_path / "out", "two")
    old = Path(str(caught.value).rpartition("The earlier export is in ")[2].removesuffix("."))
    assert files(old) == {"one", MARKER_FILE}
    assert [path for path in tmp_path.rglob("*") if path.name == "new"] == []


@pytest.mark.parametrize("name", ["file/out", "file/sub/out", "o" * 250])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    """In place of one without rights, which the superuser has everywhere."""
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=f"{name} cannot be made: (Not a directory|File exists|File name)") as caught:
        write(tmp_path / name, "one")
    assert "/." not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
