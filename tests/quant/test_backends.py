"""Choosing a backend, and what each refuses."""

import numpy as np
import pytest
from torch import nn

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import BACKENDS as BACKEND_NAMES
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.plan_calibration import ModuleCalibration
from peft_autoqra.quant.backends import BACKENDS, BitsAndBytesBackend, NativeBackend, layer_bits, make_backend
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.quant.packing import NATIVE_BITS


def test_every_backend_has_a_name_that_plans_know() -> None:
    assert tuple(BACKENDS) == BACKEND_NAMES


def test_settings_choose_the_backend() -> None:
    native = make_backend(QuantizerSettings(group_size=32))
    assert isinstance(native, NativeBackend)
    assert native.group_size == 32
    assert isinstance(make_backend(QuantizerSettings(backend="bitsandbytes")), BitsAndBytesBackend)


@pytest.mark.parametrize("bits", NATIVE_BITS)
@pytest.mark.parametrize("shape", [(5, 24), (64, 576), (300, 8)])
def test_native_bytes_are_those_of_the_layer(bits: int, shape: tuple[int, int]) -> None:
    backend = NativeBackend(QuantizerSettings(group_size=128))
    calibration = ModuleCalibration(input_second_moment=np.ones(shape[1], dtype=np.float32))
    layer = backend.quantize(nn.Linear(shape[1], shape[0]), bits, calibration, "layer")
    assert isinstance(layer, QuantLinear)
    assert layer_bits(layer) == bits
    metadata = layer.scale_codes.nbytes + layer.scale_base.nbytes
    assert backend.num_bytes(*shape, bits, "layer") == (layer.W_q.nbytes, metadata)


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_native_refuses_other_bits_by_name(bits: int) -> None:
    with pytest.raises(InvalidPlanError, match=rf"bits={bits} of 'q_proj'"):
        NativeBackend(QuantizerSettings(group_size=64)).num_bytes(64, 64, bits, "q_proj")


@pytest.mark.parametrize(("bits", "kind"), [(4, NF4Linear), (8, Int8Linear)])
def test_bitsandbytes_has_4_and_8_bits(bits: int, kind: type[nn.Module]) -> None:
    backend = BitsAndBytesBackend(QuantizerSettings())
    layer = backend.quantize(nn.Linear(64, 32), bits, None, "q_proj")
    assert type(layer) is kind
    assert layer_bits(layer) == layer.bits == bits
    for other in (2, 4, 8, 16):
        assert backend.could_have_made(layer, other, None, "q_proj") == (other == bits)
        assert not NativeBackend(QuantizerSettings(group_size=64)).could_have_made(layer, other, None, "q_proj")
    native = NativeBackend(QuantizerSettings()).quantize(nn.Linear(64, 32), bits, None, "l")
    assert not backend.could_have_made(native, bits, None, "l")


@pytest.mark.parametrize("bits", [1, 2, 3, 16])
def test_bitsandbytes_refuses_other_bits_by_name(bits: int) -> None:
    message = rf"bits={bits} of 'q_proj'.*4 bits \(NF4\) and 8 bits \(int8\)"
    with pytest.raises(InvalidPlanError, match=message):
        BitsAndBytesBackend(QuantizerSettings()).num_bytes(64, 64, bits, "q_proj")
    with pytest.raises(InvalidPlanError, match=message):
        BitsAndBytesBackend(QuantizerSettings()).quantize(nn.Linear(64, 64), bits, None, "q_proj")


def test_bits_of_layers() -> None:
    dense = nn.Linear(64, 64)
    assert layer_bits(dense) == 16
    assert layer_bits(NF4Linear(dense)) == 4
    assert layer_bits(Int8Linear(dense)) == 8
    assert layer_bits(NativeBackend(QuantizerSettings(group_size=64)).quantize(dense, 3, None, "layer")) == 3


def test_an_input_size_without_groups_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(InvalidPlanError, match="'odd' has 20 input features"):
        NativeBackend(QuantizerSettings(group_size=64)).quantize(nn.Linear(20, 4), 4, None, "odd")
