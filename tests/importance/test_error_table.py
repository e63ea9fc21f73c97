import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.error_table import ErrorTable
from peft_autoqra.search_space import ModuleGroup, SearchSpace


@pytest.fixture
def table() -> ErrorTable:
    """Falls with bits and rank."""
    rises = np.random.default_rng(0).random((3, 2, 9))
    rises = np.cumsum(rises[:, ::-1, ::-1], axis=2)[:, ::-1, ::-1]
    rises[:, 0] += rises[:, 1]
    return ErrorTable(("q", "k", "down"), (2, 4), rises, "a")


def test_unquantized_modules_rise_nothing(table):
    assert [table.rise("q", 16, rank) for rank in (0, 8)] == [0, 0]


def test_loss_table_sums_over_the_modules_of_a_group(table):
    groups = (ModuleGroup("attention", ("q", "k"), 4), ModuleGroup("down", ("down",), 16))
    space = SearchSpace(groups, (2, 4, 16), (0, 1, 4, 8))
    losses = table.loss_table(space)
    assert losses.shape == (2, 3, 4)
    assert losses.dtype == np.float64
    assert losses[0, 0, 1] == pytest.approx(table.rise("q", 2, 1) + table.rise("k", 2, 1))
    assert losses[1, 1, 2] == pytest.approx(table.rise("down", 4, 4))
    assert not losses[:, 2].any()
    assert bool((np.diff(losses, axis=1) <= 0).all())
    assert bool((np.diff(losses, axis=2) <= 0).all())


@pytest.mark.parametrize(
    ("module", "bits", "rank"), [("absent", 2, 0), ("q", 3, 0), ("q", 2, 9)], ids=["module", "bits", "rank"]
)
def test_refuses_what_was_not_measured(table, module, bits, rank):
    with pytest.raises(CalibrationError, match=f"'{module}' at bits \\({bits},\\) and ranks \\({rank},\\) is not in"):
        table.rise(module, bits, rank)


def test_survives_saving(table, tmp_path):
    table.save(tmp_path / "t.safetensors")
    loaded = ErrorTable.load(tmp_path / "t.safetensors")
    assert (loaded.module_names, loaded.bit_choices, loaded.fingerprint) == (("q", "k", "down"), (2, 4), "a")
    np.testing.assert_array_equal(loaded.rises, table.rises)


def test_refuses_damaged_and_foreign_files(table, tmp_path):
    path = tmp_path / "t.safetensors"
    table.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="no error table or damaged"):
        ErrorTable.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CalibrationError, match="no error table or damaged"):
        ErrorTable.load(path)


@pytest.mark.parametrize("rises", [np.zeros((1, 1, 3)), np.full((2, 1, 3), np.nan)])
def test_refuses_values_that_fit_nothing(rises):
    with pytest.raises(CalibrationError, match="must be finite and of shape"):
        ErrorTable(("a", "b"), (4,), rises)
