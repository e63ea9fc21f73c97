"""What is there is replaced as a whole or not at all."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from peft_autoqra.errors import AutoQRAError, InvalidPlanError, StorageError
from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.plan_calibration import PlanCalibration
from peft_autoqra.replaced_file import replaced_contents, replaced_file, stored
from tests.full_disk import full_disk


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.partial").write_text("of a process that was killed")
    with replaced_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replaced_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def write_text(path):
    path.write_text("x" * 1000)


def write_safetensors(path):
    save_file({"x": np.zeros(1000)}, path)


def write_torch(path):
    torch.save({"x": torch.zeros(1000)}, path)


@pytest.mark.parametrize("write", [write_text, write_safetensors, write_torch])
def test_a_full_disk_is_one_error_whoever_writes(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    told = pytest.raises(StorageError, match=r"file cannot be written \(.*free disk space")
    with full_disk(), told, replaced_file(path) as partial:
        write(partial)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_stream_that_torch_cannot_flush_is_a_full_disk(tmp_path):
    with pytest.raises(StorageError, match=r"iostream error.*free disk space"), stored(tmp_path):
        raise RuntimeError("basic_ios::clear: iostream error")  # which byte the disk ends at decides the words


def test_other_errors_pass(tmp_path):
    for error in (RuntimeError("shapes"), InvalidPlanError("bits"), ValueError("x")):
        with pytest.raises(type(error)) as found, stored(tmp_path):
            raise error
        assert found.value is error


def test_contents_are_replaced_together(tmp_path):
    for name in ("README.md", "kept", "replaced"):
        (tmp_path / name).write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "gone").write_text("old")
    with replaced_contents(tmp_path) as new:
        assert (new / "README.md").read_text() == "old"
        (new / "replaced").write_text("new")
        (new / "folder").mkdir()
        (new / "folder" / "one").write_text("new")
        assert (tmp_path / "replaced").read_text() == "old"
    assert {name: (tmp_path / name).read_text() for name in ("README.md", "kept", "replaced")} == {
        "README.md": "old",
        "kept": "old",
        "replaced": "new",
    }
    assert names(tmp_path / "folder") == ["one"]
    assert names(tmp_path) == ["README.md", "folder", "kept", "replaced"]


def test_contents_stay_where_one_file_cannot_be_written(tmp_path):
    (tmp_path / "a").write_text("old")

    def write_both():
        with replaced_contents(tmp_path) as new:
            (new / "a").write_text("new")
            write_text(new / "b")

    with full_disk(), pytest.raises(StorageError):
        write_both()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_plan_survives_that_another_cannot_be_saved_in_its_place(tmp_path):
    plans = [
        BitRankPlan(
            {"a.b": LayerPlan(bits, 4)},
            shapes={"a.b": (32, 64)},
            initialization="compensate",
            calibration=PlanCalibration(input_second_moments={"a.b": np.full(64, bits, np.float32)}),
        )
        for bits in (2, 3)
    ]
    plans[0].save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(), pytest.raises(AutoQRAError, match="cannot be written"):
        plans[1].save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
