"""Every way to decode gives the same bits: in chunks, at once, compiled, and as a slow formula in numpy."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from peft_autoqra.errors import MissingDependencyError
from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant import compiled_decode, decoding
from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.backends import NativeBackend
from peft_autoqra.quant.linear import QuantLinear
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


def make_layer(
    columns: int, rows: int, bits: int, *, group_size: int = 16, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    backend = NativeBackend(QuantizerSettings(group_size=group_size))
    return backend.quantize(nn.Linear(columns, rows, dtype=dtype), bits, None, "layer")


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
    layer = make_layer(48, 7, bits).to("meta")
    assert layer.dequantize().shape == (7, 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_training_keeps_the_packed_bytes_and_nothing_else(bits: int, dtype: torch.dtype) -> None:
    layer = make_layer(192, 37, bits, group_size=64, dtype=dtype)
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
    compiled_decode._kernel.cache_clear()
    compiled_decode.compile_decoding(True)
    yield
    compiled_decode.compile_decoding(None)


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
                dense = torch.empty(rows * columns // 64, 64, dtype=dtype)
                assert compiled_decode.decode_compiled(dense, quantized.codes, scale, offset, bits, 64)
                assert torch.equal(quantized.dequantize(dtype), dense.view(rows, columns))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_layers_compute_the_same_with_compiled_decoding(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_decode, "_WEIGHTS_AT_ONCE", 8 * 64)  # in ten parts
    layer = make_layer(128, 40, 3, group_size=64, dtype=torch.bfloat16)
    expected = linear(torch.ones(3, 128, dtype=torch.bfloat16), layer.dequantize(), layer.bias)
    calls, original = [], compiled_decode.decode_compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_decode, "decode_compiled", lambda *args: (calls.append(1), original(*args))[1])
        assert torch.equal(layer(torch.ones(3, 128, dtype=torch.bfloat16)), expected)
    assert calls


def test_large_layers_compile_by_themselves_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_compiler in (True, False):
        monkeypatch.setattr(compiled_decode, "_has_compiler", lambda has=has_compiler: has)
        assert compiled_decode.compiles(2**22) == has_compiler
        assert not compiled_decode.compiles(2**22 - 1)
    compiled_decode.compile_decoding(False)
    try:
        assert not compiled_decode.compiles(2**30)
    finally:
        compiled_decode.compile_decoding(None)


def test_a_tool_chain_that_fails_costs_a_warning_and_nothing_else(compiled: None, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no headers")

    def fail_without_a_word(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(compiled_decode, "_kernel", lambda *args: fail)
    layer, x = make_layer(48, 7, 3), torch.ones(2, 48)
    with pytest.warns(UserWarning, match=r"cannot be compiled \(RuntimeError: no headers\); it goes on without"):
        output = layer(x)
    assert torch.equal(output, linear(x, layer.dequantize(), layer.bias))
    assert torch.equal(layer(x), output)  # without a second warning
    compiled_decode.compile_decoding(True)
    monkeypatch.setattr(compiled_decode, "_kernel", lambda *args: fail_without_a_word)
    with pytest.warns(UserWarning, match=r"AssertionError: \)"):
        layer(x)


class TestWorkspace:
    """Passes decode into one buffer; nothing of it may be left in a result."""

    def test_results_outlive_the_next_pass(self) -> None:
        torch.manual_seed(0)
        layers = [make_layer(64, 48, bits) for bits in NATIVE_BITS]
        x = torch.randn(5, 64, requires_grad=True)
        outputs = [layer(x) for layer in layers]
        for layer, output in zip(layers, outputs, strict=True):
            assert torch.equal(output, linear(x, layer.dequantize(), layer.bias))
        sum(output.square().sum() for output in outputs).backward()
        twin = x.detach().clone().requires_grad_()
        sum(linear(twin, layer.dequantize(), layer.bias).square().sum() for layer in layers).backward()
        torch.testing.assert_close(x.grad, twin.grad)

    def test_dequantize_gives_memory_of_its_own(self) -> None:
        layer = make_layer(64, 48, 3)
        dense = layer.dequantize()
        kept = dense.clone()
        make_layer(64, 48, 2)(torch.ones(1, 64))
        assert torch.equal(dense, kept)

    def test_training_works_after_generation_in_inference_mode_and_the_other_way(self) -> None:
        small, large = make_layer(64, 48, 3), make_layer(128, 96, 3)
        with torch.inference_mode():
            small(torch.ones(1, 64))
            large(torch.ones(1, 128))
        x = torch.ones(1, 128, requires_grad=True)
        large(x).sum().backward()
        with torch.inference_mode():
            assert torch.equal(large(x), large(torch.ones(1, 128)))

    @pytest.mark.parametrize("mode", ["default dtype", "default device", "fake"])
    def test_what_else_is_in_force_changes_nothing(self, mode: str) -> None:
        layer, x = make_layer(64, 48, 3), torch.ones(2, 64)
        expected = linear(x, layer.dequantize(), layer.bias)

        def run() -> bool:  # in a thread without a workspace
            if mode == "default dtype":
                torch.set_default_dtype(torch.bfloat16)
                same = torch.equal(layer(x), expected)
                torch.set_default_dtype(torch.float32)
            elif mode == "default device":
                with torch.device("meta"):
                    same = torch.equal(layer(x), expected)
            else:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    layer(x)
                same = True
            return same and torch.equal(layer(x), expected)

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run).result()

    def test_threads_do_not_share_it(self) -> None:
        torch.manual_seed(0)
        layers = [make_layer(256, 256, bits) for bits in NATIVE_BITS]
        x = torch.randn(4, 256)
        expected = [linear(x, layer.dequantize(), layer.bias) for layer in layers]

        def run(index: int) -> bool:
            return all(torch.equal(layers[index](x), expected[index]) for _ in range(50))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(4)))


def test_compiled_decoding_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_decode._has_compiler.cache_clear()
    monkeypatch.setattr(compiled_decode, "_has_compiler", compiled_decode._has_compiler.__wrapped__)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="install g\\+\\+"):
        compiled_decode.compile_decoding(True)
    assert not compiled_decode.compiles(1)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_model_of_all_bits_is_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [make_layer(48, 48, bits) for bits in NATIVE_BITS]
    model = nn.Sequential(*layers)
    compiled_model = torch.compile(copy.deepcopy(model), fullgraph=True, backend="inductor")
    for num_tokens in (3, 5, 8, 13):
        x, twin = (torch.linspace(-1, 1, num_tokens * 48).view(-1, 48).requires_grad_() for _ in range(2))
        output, expected = compiled_model(x), model(twin)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
