import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.statistics import CalibrationStatistics, ModuleStatistics, StatisticsStore


def make(gram: torch.Tensor, num_outputs: int = 3, num_tokens: int = 5) -> ModuleStatistics:
    return ModuleStatistics(
        input_gram=gram, output_gradient_second_moment=torch.arange(num_outputs).float(), num_tokens=num_tokens
    )


@pytest.fixture
def statistics() -> CalibrationStatistics:
    shared = torch.eye(4) * 2
    return CalibrationStatistics(
        {"q": make(shared), "k": make(shared, 2), "o": make(torch.zeros(3), num_tokens=7)}, fingerprint="model+data"
    )


@pytest.fixture
def directory(statistics, tmp_path):
    store = StatisticsStore(tmp_path, "model+data")
    store.add(0, {name: statistics[name] for name in ("q", "k")})
    store.add(7, {"o": statistics["o"]})
    return tmp_path


def load(directory, fingerprint: str = "model+data") -> CalibrationStatistics | None:
    return StatisticsStore(directory, fingerprint).load(["q", "k", "o"])


def test_survives_saving_and_keeps_shared_grams_shared(statistics, directory):
    loaded = load(directory)
    assert list(loaded) == ["q", "k", "o"]
    assert loaded.fingerprint == "model+data"
    assert loaded["q"].input_gram is loaded["k"].input_gram
    for name in statistics:
        assert torch.equal(loaded[name].input_gram, statistics[name].input_gram)
        assert torch.equal(loaded[name].output_gradient_second_moment, statistics[name].output_gradient_second_moment)
        assert loaded[name].num_tokens == statistics[name].num_tokens
    with safe_open(directory / "part-00000.safetensors", framework="pt") as file:
        assert sum(key.startswith("input_gram") for key in file.keys()) == 1  # noqa: SIM118


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
        StatisticsStore(None, "").add(0, {"m": bad})


def test_refuses_no_modules():
    with pytest.raises(CalibrationError, match="target_modules"):
        CalibrationStatistics({})


def test_what_is_missing_of_another_fingerprint_or_damaged_is_not_taken(directory):
    assert load(directory, "other") is None
    assert StatisticsStore(directory, "model+data").load(["q", "v"]) is None
    path = directory / "part-00007.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    assert load(directory) is None
    save_file({"a": torch.zeros(1)}, path)
    assert load(directory) is None
    save_file({"a": torch.zeros(1)}, path, metadata={"autoqra_calibration_statistics": json.dumps({"version": 99})})
    assert load(directory) is None
    path.write_bytes(content)
    assert load(directory) is not None
