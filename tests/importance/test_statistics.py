import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.statistics import CalibrationStatistics, ModuleStatistics


def make(gram: torch.Tensor, num_outputs: int = 3, num_tokens: int = 5) -> ModuleStatistics:
    return ModuleStatistics(
        input_gram=gram, output_gradient_second_moment=torch.arange(num_outputs).float(), num_tokens=num_tokens
    )


@pytest.fixture
def statistics() -> CalibrationStatistics:
    shared = torch.eye(4) * 2
    return CalibrationStatistics(
        {"q": make(shared), "k": make(shared, 2), "o": make(torch.zeros(3, 3), num_tokens=7)}, fingerprint="model+data"
    )


def test_survives_saving_and_keeps_shared_grams_shared(statistics, tmp_path):
    statistics.save(tmp_path / "s.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "s.safetensors", fingerprint="model+data")

    assert list(loaded) == ["q", "k", "o"]
    assert loaded["q"].input_gram is loaded["k"].input_gram
    for name in statistics:
        assert torch.equal(loaded[name].input_gram, statistics[name].input_gram)
        assert torch.equal(loaded[name].output_gradient_second_moment, statistics[name].output_gradient_second_moment)
        assert loaded[name].num_tokens == statistics[name].num_tokens
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert sum(key.startswith("input_gram") for key in file.keys()) == 2  # noqa: SIM118


def test_input_second_moment_is_the_diagonal(statistics):
    assert torch.equal(statistics["q"].input_second_moment, torch.full((4,), 2.0))


def test_unknown_module_is_named(statistics):
    with pytest.raises(KeyError, match="'v' was not calibrated"):
        statistics["v"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (make(torch.full((2, 2), torch.nan)), "'m' are not finite"),
        (make(torch.zeros(2, 3)), r"'m' have shapes \(2, 3\)"),
        (make(torch.eye(2), num_tokens=0), "'m' rest on no tokens"),
    ],
)
def test_refuses_bad_statistics(bad, message):
    with pytest.raises(CalibrationError, match=message):
        CalibrationStatistics({"m": bad})


def test_refuses_no_modules():
    with pytest.raises(CalibrationError, match="target_modules"):
        CalibrationStatistics({})


def test_refuses_another_fingerprint(statistics, tmp_path):
    statistics.save(tmp_path / "s.safetensors")
    with pytest.raises(CalibrationError, match=r"'model\+data', not 'other'"):
        CalibrationStatistics.load(tmp_path / "s.safetensors", fingerprint="other")


def test_refuses_damaged_and_foreign_files(statistics, tmp_path):
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="damaged"):
        CalibrationStatistics.load(path)

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CalibrationError, match="no calibration statistics"):
        CalibrationStatistics.load(path)

    save_file({"a": torch.zeros(1)}, path, metadata={"autoqra_calibration_statistics": json.dumps({"version": 99})})
    with pytest.raises(CalibrationError, match="format 99"):
        CalibrationStatistics.load(path)


def test_refuses_a_file_that_lacks_a_tensor(tmp_path):
    header = {"version": 1, "fingerprint": "", "modules": {"m": {"gram_owner": "m", "num_tokens": 1}}}
    metadata = {"autoqra_calibration_statistics": json.dumps(header)}
    save_file({"input_gram:m": torch.eye(2)}, tmp_path / "s.safetensors", metadata=metadata)
    with pytest.raises(CalibrationError, match="lacks 'output_gradient_second_moment:m'"):
        CalibrationStatistics.load(tmp_path / "s.safetensors")
