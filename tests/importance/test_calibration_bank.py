"""The bank of quantized weights, in memory and on disk."""

import pytest
import torch

from peft_autoqra.errors import CalibrationError, InvalidPlanError
from peft_autoqra.importance import calibration, calibration_bank
from peft_autoqra.importance.bank_store import BankStore
from peft_autoqra.importance.calibration_bank import BankSettings, build_calibration_bank
from peft_autoqra.importance.module_fit import CalibratedModule, FitSettings
from peft_autoqra.plan import LayerPlan, QuantizerSettings
from peft_autoqra.target_modules import linear_targets

BITS = (2, 3, 8, 16)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture
def names(model):
    return tuple(linear_targets(model))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))}]


def settings(names, backend: str = "native", bit_choices=BITS) -> BankSettings:
    quantizer = QuantizerSettings(backend=backend, group_size=32)
    return BankSettings(
        module_names=tuple(names), bit_choices=bit_choices, quantizer=quantizer, fit=FitSettings(max_rank=4)
    )


def assert_same(found, wanted) -> None:
    assert found.entries.keys() == wanted.entries.keys()
    assert found.fingerprint == wanted.fingerprint
    for key, entry in wanted.entries.items():
        other = found.entries[key]
        assert other.weight.format == entry.weight.format
        assert torch.equal(other.weight.dequantize(), entry.weight.dequantize())
        for kind in ("left", "right"):
            assert (getattr(other.correction, kind) == getattr(entry.correction, kind)).all()
        assert (other.rises == entry.rises).all()
        assert (other.input_second_moment == entry.input_second_moment).all()


@pytest.mark.parametrize("backend", ["native", "gptq"])
def test_disk_and_memory_hold_the_same_and_nothing_is_made_twice(model, names, tmp_path, monkeypatch, backend):
    in_memory = build_calibration_bank(model, batches(), settings(names, backend))
    assert_same(build_calibration_bank(model, batches(), settings(names, backend), directory=tmp_path), in_memory)
    monkeypatch.setattr(calibration_bank, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    assert_same(build_calibration_bank(model, batches(), settings(names, backend), directory=tmp_path), in_memory)


def test_another_bit_width_or_quantizer_needs_no_second_calibration(model, names, tmp_path, monkeypatch):
    build_calibration_bank(model, batches(), settings(names, bit_choices=(3,)), directory=tmp_path)
    expected = [build_calibration_bank(model, batches(), settings(names, backend)) for backend in ("native", "gptq")]
    made, fit = [], CalibratedModule.fit
    monkeypatch.setattr(CalibratedModule, "fit", lambda self, *args: (made.append(args[1]), fit(self, *args))[1])
    monkeypatch.setattr(calibration._Calibration, "run", lambda _: pytest.fail("measured again"))
    for backend, bank in zip(("native", "gptq"), expected, strict=True):
        assert_same(build_calibration_bank(model, batches(), settings(names, backend), directory=tmp_path), bank)
    assert sorted(made) == sorted(len(names) * [2, 8] + len(names) * [2, 3, 8])


def test_a_build_that_was_stopped_goes_on(model, names, tmp_path, monkeypatch):
    original, made = BankStore.put, []

    def stop_after_ten(self, name, bits, entry):
        if len(made) == 10:
            raise KeyboardInterrupt
        made.append((name, bits))
        original(self, name, bits, entry)

    with monkeypatch.context() as patch:
        patch.setattr(BankStore, "put", stop_after_ten)
        with pytest.raises(KeyboardInterrupt):
            build_calibration_bank(model, batches(), settings(names), directory=tmp_path)
    first = list(made)
    monkeypatch.setattr(BankStore, "put", lambda *args: (made.append(args[1:3]), original(*args)))
    bank = build_calibration_bank(model, batches(), settings(names), directory=tmp_path)
    assert len(made) == len(set(made)) == 3 * len(names)
    assert made[:10] == first
    assert_same(bank, build_calibration_bank(model, batches(), settings(names)))


def test_plans_get_what_their_layers_take(model, names):
    bank = build_calibration_bank(model, batches(), settings(names, "gptq"))
    layers = {name: LayerPlan(BITS[i % 4], i % 3) for i, name in enumerate(names)}
    calibration = bank.for_layers(layers)
    assert set(calibration.codes) == {name for name, layer in layers.items() if layer.bits < 16}
    assert not calibration.input_second_moments
    assert {n: c.rank for n, c in calibration.corrections.items()} == {
        name: layer.rank for name, layer in layers.items() if layer.bits < 16 and layer.rank
    }
    with pytest.raises(InvalidPlanError, match="was not calibrated at 4 bits"):
        bank.for_layers({names[0]: LayerPlan(4, 0)})
    with pytest.raises(InvalidPlanError, match=r"Rank 8 of .* is above the calibrated 4"):
        bank.for_layers({names[0]: LayerPlan(3, 8)})


def test_error_feedback_leaves_less_error(model, names):
    tables = [build_calibration_bank(model, batches(), settings(names, b)).error_table for b in ("native", "gptq")]
    assert tables[1].rises[..., 4].sum() < 0.95 * tables[0].rises[..., 4].sum()


def test_layers_of_zeros_cost_nothing(model, names):
    with torch.no_grad():
        model.get_submodule(names[0]).weight.zero_()
    for backend in ("native", "gptq"):
        bank = build_calibration_bank(model, batches(), settings(names, backend))
        assert not bank.error_table.rises[0].any()
        for bits in BITS[:-1]:
            assert not bank.entries[names[0], bits].weight.dequantize().any()


def test_refuses_layers_that_are_not_finite(model, names):
    with torch.no_grad():
        model.get_submodule(names[3]).weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=f"outputs of '{names[3]}' hold NaN or infinity"):
        build_calibration_bank(model, batches(), settings(names))


def test_refuses_quantizers_without_calibration(model, names):
    with pytest.raises(InvalidPlanError, match="bitsandbytes backend takes no calibration"):
        build_calibration_bank(model, batches(), settings(names, "bitsandbytes"))


def test_refuses_no_bit_widths(names):
    with pytest.raises(CalibrationError, match="bit_choices"):
        settings(names, bit_choices=())


@pytest.mark.parametrize("position", [-1, -200])
def test_a_changed_byte_is_noticed_and_that_file_made_again(model, names, tmp_path, monkeypatch, position):
    wanted = build_calibration_bank(model, batches(), settings(names))
    build_calibration_bank(model, batches(), settings(names), directory=tmp_path)
    entry = sorted(tmp_path.glob("bank-*/3bit/*.safetensors"))[0]
    part = sorted(tmp_path.glob("statistics-*/*.safetensors"))[0]
    for path in (entry, part):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
    made, put = [], BankStore.put
    monkeypatch.setattr(BankStore, "put", lambda *args: (made.append(args[1:3]), put(*args)))
    assert_same(build_calibration_bank(model, batches(), settings(names), directory=tmp_path), wanted)
    assert [bits for _, bits in made] == [3]
