from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.error_table import ErrorTable, ErrorTableSettings, build_error_table
from peft_autoqra.importance.statistics import CalibrationStatistics, ModuleStatistics
from peft_autoqra.search_space import ModuleGroup, SearchSpace

SETTINGS = ErrorTableSettings(bit_choices=(2, 4, 16), max_rank=8, fingerprint="a")
SHAPES = {"q": (16, 32), "k": (4, 32), "down": (32, 16)}


def round_to_nearest(weight: torch.Tensor, bits: int, input_second_moment: torch.Tensor) -> torch.Tensor:
    assert input_second_moment.shape == weight.shape[1:]
    step = weight.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
    return (weight / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def statistics() -> CalibrationStatistics:
    generator = torch.Generator().manual_seed(1)
    grams = {}
    for size in (32, 16):
        inputs = torch.randn(100, size, generator=generator)
        grams[size] = inputs.T @ inputs / 100
    return CalibrationStatistics(
        {
            name: ModuleStatistics(
                input_gram=grams[num_inputs],
                output_gradient_second_moment=torch.rand(num_outputs, generator=generator),
                num_tokens=100,
            )
            for name, (num_outputs, num_inputs) in SHAPES.items()
        }
    )


@pytest.fixture
def table(weights, statistics) -> ErrorTable:
    return build_error_table(weights.items(), statistics, round_to_nearest, SETTINGS)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_rise_is_half_the_squared_singular_values_left(table, weights, statistics, name, bits):
    module, weight = statistics[name], weights[name]
    moment = module.input_gram + SETTINGS.damping * module.input_gram.diagonal().mean() * torch.eye(weight.shape[1])
    scale = module.output_gradient_second_moment.clamp_min(1e-2 * module.output_gradient_second_moment.mean()).sqrt()
    error = weight - round_to_nearest(weight, bits, module.input_second_moment)
    whitened = scale[:, None] * error @ torch.linalg.cholesky(moment)
    squares = torch.linalg.svdvals(whitened.double()).square()
    for rank in range(9):
        expected = float(squares[rank:].sum()) / 2
        assert table.rise(name, bits, rank) == pytest.approx(expected, rel=1e-4, abs=1e-6 * float(squares.sum()))


def test_unquantized_modules_rise_nothing(table):
    assert [table.rise("q", 16, rank) for rank in (0, 8)] == [0, 0]


def test_full_rank_leaves_nothing(table):
    assert table.rise("k", 2, 3) > 0
    assert [table.rise("k", 2, rank) for rank in (4, 8)] == [0, 0]


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


def test_corrections_reach_the_sink_and_leave_what_the_table_says(weights, statistics):
    corrections = {}

    def keep(name, bits, left, right):
        corrections[name, bits] = (left, right)

    table = build_error_table(weights.items(), statistics, round_to_nearest, SETTINGS, on_correction=keep)
    assert set(corrections) == {(name, bits) for name in SHAPES for bits in (2, 4)}
    assert corrections["k", 2][0].shape == (4, 4)
    assert corrections["q", 2][1].shape == (8, 32)

    left, right = corrections["q", 2]
    module = statistics["q"]
    quantized = round_to_nearest(weights["q"], 2, module.input_second_moment)
    for rank in (0, 2, 8):
        error = weights["q"] - quantized - left[:, :rank] @ right[:rank]
        quadratic = (error @ module.input_gram * error).sum(1)
        rise = float((module.output_gradient_second_moment * quadratic).sum()) / 2
        assert rise == pytest.approx(table.rise("q", 2, rank), rel=0.02)


def test_survives_saving(table, tmp_path):
    table.save(tmp_path / "t.safetensors")
    loaded = ErrorTable.load(tmp_path / "t.safetensors", SETTINGS)
    assert loaded.module_names == table.module_names
    assert loaded.settings == SETTINGS
    np.testing.assert_array_equal(loaded.rises, table.rises)


@pytest.mark.parametrize(
    "change", [{"fingerprint": "b"}, {"max_rank": 4}, {"bit_choices": (2, 3, 4)}, {"damping": 0.1}], ids=str
)
def test_refuses_a_table_of_other_settings(table, tmp_path, change):
    table.save(tmp_path / "t.safetensors")
    with pytest.raises(CalibrationError, match=f"other settings.*{next(iter(change))}"):
        ErrorTable.load(tmp_path / "t.safetensors", replace(SETTINGS, **change))


def test_refuses_damaged_and_foreign_files(table, statistics, tmp_path):
    path = tmp_path / "t.safetensors"
    table.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="no error table or damaged"):
        ErrorTable.load(path, SETTINGS)
    statistics.save(path)
    with pytest.raises(CalibrationError, match="no error table or damaged"):
        ErrorTable.load(path, SETTINGS)


def test_refuses_modules_without_statistics_and_no_modules(weights, statistics):
    with pytest.raises(CalibrationError, match="'other' was not calibrated"):
        build_error_table([("other", weights["q"])], statistics, round_to_nearest, SETTINGS)
    with pytest.raises(CalibrationError, match="target_modules"):
        build_error_table([], statistics, round_to_nearest, SETTINGS)


def test_refuses_weights_of_another_model(weights, statistics):
    with pytest.raises(
        CalibrationError, match=r"'q' has a weight of shape \(32, 16\), but was calibrated with \(16, 32\)"
    ):
        build_error_table([("q", weights["down"])], statistics, round_to_nearest, SETTINGS)


def test_refuses_settings_that_measure_nothing():
    with pytest.raises(CalibrationError, match="nothing to measure"):
        ErrorTableSettings(bit_choices=(), max_rank=4)
