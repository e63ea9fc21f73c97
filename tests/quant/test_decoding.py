"""Every way to decode gives the same bits: in chunks, at once, compiled, and as a slow formula in numpy."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.quant import compiled_decode, decoding
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.backends import NativeBackend
from peft_autoqra.quant.packing import NATIVE_BITS
from peft_autoqra.quant.quantized_weight import QuantizedWeight, group_scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slow_reference(quantized: QuantizedWeight) -> np.ndarray:
    """Code by code from the bit stream; float32 rounded once per weight, ``[out_features, in_features]``."""
    weight_format = quantized.format
    bits, group_size = weight_format.bits, weight_format.group_size
    stream = np.unpackbits(quantized.codes.numpy(), bitorder="little")
    base = quantized.scale_base.view(torch.bfloat16).double().numpy()
    weights = []
    for index in range(weight_format.out_features * weight_format.in_features):
        code = sum(int(bit) << place for place, bit in enumerate(stream[index * bits : (index + 1) * bits]))
        group = index // group_size
        if bits == 8:
            weights.append(np.float32(base[group] * (code - 128)))
            continue
        minimum, step = base[:, group // 256].T
        scale, offset = np.float32(minimum + step * quantized.scale_codes[:, group].numpy())
        scale = (scale.view(np.int32) & ~np.int32(15)).view(np.float32)
        weights.append(np.float32(np.float64(scale) * code + np.float64(offset)))
    return np.array(weights, dtype=np.float32).reshape(weight_format.out_features, weight_format.in_features)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(NATIVE_BITS),
    group_size=st.sampled_from((8, 16, 24, 64, 128)),
    rows=st.integers(1, 13),
    groups_per_row=st.integers(1, 5),
    chunk=st.sampled_from((1, 100, 2**17)),
)
def test_decodes_to_the_bits_of_the_slow_formula(
    bits: int, group_size: int, rows: int, groups_per_row: int, chunk: int
) -> None:
    quantized = quantize_affine(torch.randn(rows, group_size * groups_per_row), bits=bits, group_size=group_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "CHUNK_WEIGHTS_PER_THREAD", chunk)
        decoded = quantized.dequantize()
    np.testing.assert_array_equal(decoded.numpy(), slow_reference(quantized))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_scale_times_a_code_is_exact(bits: int) -> None:
    quantized = quantize_affine(torch.randn(64, 256), bits=bits, group_size=8)
    scale, _ = group_scales(bits, quantized.scale_codes, quantized.scale_base)
    for code in range(2**bits):
        assert torch.equal((scale * code).double(), scale.double() * code)


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_a_layer_on_the_meta_device_decodes_to_its_shape(bits: int) -> None:
    layer = NativeBackend(16).quantize(nn.Linear(48, 7), bits, None, "layer").to("meta")
    assert layer.dequantize().shape == (7, 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_training_keeps_the_packed_bytes_and_nothing_else(bits: int, dtype: torch.dtype) -> None:
    layer = NativeBackend(64).quantize(nn.Linear(192, 37, bias=False, dtype=dtype), bits, None, "layer")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(50, 192, dtype=dtype, requires_grad=True))
    assert sum(kept.values()) == layer.weight_format.weight_bytes + layer.weight_format.metadata_bytes


@pytest.fixture
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    compiled_decode._compiled.cache_clear()
    compiled_decode.enable_compiled_decode()
    yield
    compiled_decode.enable_compiled_decode(False)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_compiled_decoding_stays_within_the_recompile_limit_and_keeps_the_bits(
    compiled: None, dtype: torch.dtype
) -> None:
    shapes = [(rows, 64 * groups) for rows in (3, 5, 37, 64) for groups in (1, 3, 7)]  # more than the limit of 8
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for bits in NATIVE_BITS:
            for rows, columns in shapes:
                quantized = quantize_affine(torch.randn(rows, columns), bits=bits, group_size=64)
                scale, offset = group_scales(bits, quantized.scale_codes, quantized.scale_base)
                plain = compiled_decode.decode_whole(quantized.codes, scale, offset, bits, 64, dtype)
                assert torch.equal(quantized.dequantize(dtype), plain.view(rows, columns))


def test_compiled_decoding_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="install g\\+\\+"):
        compiled_decode.enable_compiled_decode()
    assert not compiled_decode.is_enabled()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_model_of_all_bits_is_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [NativeBackend(16).quantize(nn.Linear(48, 48), bits, None, "layer") for bits in NATIVE_BITS]
    model = nn.Sequential(*layers)
    compiled_model = torch.compile(copy.deepcopy(model), fullgraph=True, backend="inductor")
    for num_tokens in (3, 5, 8, 13):
        x, twin = (torch.linspace(-1, 1, num_tokens * 48).view(-1, 48).requires_grad_() for _ in range(2))
        output, expected = compiled_model(x), model(twin)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
