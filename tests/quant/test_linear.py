"""QuantLinear against a dense layer with the dequantized weight."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant.backends import NativeBackend, dense_layer
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.packing import NATIVE_BITS
from tests.quant.dense_reference import assert_computes_as_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = 24, 48

BACKEND = NativeBackend(QuantizerSettings(group_size=16))


def make_layer(bits: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantLinear:
    torch.manual_seed(bits)
    return BACKEND.quantize(nn.Linear(COLUMNS, ROWS, bias=bias, dtype=dtype), bits, None, "layer")


@pytest.mark.parametrize("shape", [(COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_forward_and_gradients_equal_the_dense_layer_to_the_last_bit(
    bits: int, dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    assert_computes_as_dense(make_layer(bits, bias=bias, dtype=dtype), shape, dtype)


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_autograd_keeps_nothing_dense(bits: int) -> None:
    layer = make_layer(bits)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, COLUMNS, requires_grad=True))
    held = {id(parameter): parameter for parameter in (layer.W_q, layer.scale_codes, layer.scale_base)}
    assert {tensor.data_ptr() for tensor in kept} <= {parameter.data_ptr() for parameter in held.values()}
    assert sum(tensor.nbytes for tensor in kept) <= sum(parameter.nbytes for parameter in held.values())


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_a_frozen_bias_gets_no_gradient(bits: int) -> None:
    layer = make_layer(bits).requires_grad_(False)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bias.grad is None
    assert not layer(torch.randn(3, COLUMNS)).requires_grad


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_autocast_computes_in_its_dtype(bits: int) -> None:
    layer = make_layer(bits)
    x = torch.randn(5, COLUMNS, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        dense = linear(x, layer.dequantize(), layer.bias)
    assert output.dtype == dense.dtype == torch.bfloat16
    assert torch.equal(output, dense)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_changing_the_dtype_leaves_the_codes_alone(bits: int) -> None:
    layer = make_layer(bits)
    weight = layer.dequantize()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    layer.to(torch.bfloat16).half().to(torch.float32)
    for name, tensor in before.items():
        assert torch.equal(layer.state_dict()[name], tensor)
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_the_compute_dtype_follows_the_module(bits: int) -> None:
    layer = make_layer(bits).to(torch.bfloat16)
    assert layer.compute_dtype == layer.dequantize().dtype == layer.bias.dtype == torch.bfloat16
    dense = dense_layer(layer)
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(dense(x), layer(x))


def through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_a_copy_computes_the_same(bits: int, copied) -> None:
    layer = make_layer(bits)
    x = torch.randn(3, COLUMNS)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.W_q.data_ptr() != layer.W_q.data_ptr()


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_state_dict_round_trip(bits: int, tmp_path: Path) -> None:
    layer, other = make_layer(bits), BACKEND.quantize(nn.Linear(COLUMNS, ROWS), bits, None, "layer")
    save_model(layer, str(tmp_path / "layer.safetensors"))
    load_model(other, str(tmp_path / "layer.safetensors"))
    x = torch.randn(3, COLUMNS)
    assert torch.equal(other(x), layer(x))
    assert all(not parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_identical_gradients(reentrant: bool) -> None:
    layer = make_layer(3)
    x = torch.randn(4, COLUMNS, requires_grad=True)
    layer(x).pow(2).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_training_works_after_inference_mode(bits: int) -> None:
    layer = make_layer(bits)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    with torch.inference_mode():
        served = layer(x.detach())
    trained = layer(x)
    trained.sum().backward()
    assert torch.equal(served, trained)
    assert torch.equal(x.grad, torch.ones(3, ROWS) @ layer.dequantize())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_compiles_to_one_graph(bits: int) -> None:
    layer = make_layer(bits)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, twin = (torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).requires_grad_() for _ in range(2))
    torch.testing.assert_close(compiled(x), layer(twin))
    compiled(x).sum().backward()
    layer(twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_dense_layer_takes_over_bias_and_mode() -> None:
    layer = make_layer(4).eval()
    dense = dense_layer(layer)
    assert type(dense) is nn.Linear
    assert (dense.in_features, dense.out_features, dense.training) == (COLUMNS, ROWS, False)
    x = torch.randn(3, COLUMNS)
    assert torch.equal(dense(x), layer(x))
    with torch.no_grad():
        dense.bias += 1
    assert not torch.equal(dense.bias, layer.bias)


def test_repr_says_how_it_is_quantized() -> None:
    assert "bits=3, group_size=16" in repr(make_layer(3))


@pytest.mark.parametrize("bits", [3, 8])
def test_the_output_may_be_changed_in_place(bits: int) -> None:
    """As ReLU(inplace=True) behind it does; with a bias and more than two dimensions the product is a view."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 16)
    layer = NativeBackend(QuantizerSettings()).quantize(linear, bits, None, "name")
    x = torch.randn(3, 5, 32, requires_grad=True)
    layer(x).relu_().sum().backward()
    reference = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(reference, layer.dequantize(), layer.bias).relu().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
