"""NF4 through bitsandbytes, with the guard that CPUs with AVX512-BF16 need."""

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant.backends import BitsAndBytesBackend, dense_layer
from peft_autoqra.quant.nf4 import NF4Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_dense(rows: int = 64, columns: int = 128, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizes_to_what_bitsandbytes_itself_makes_of_the_weight(dtype: torch.dtype) -> None:
    dense = make_dense(dtype=dtype)
    codes, state = bnb.functional.quantize_4bit(dense.weight.detach(), quant_type="nf4", compress_statistics=True)
    expected = bnb.functional.dequantize_4bit(codes, state)
    assert torch.equal(NF4Linear(dense).dequantize(), expected.to(dtype))
    assert not torch.equal(expected.to(dtype), dense.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient_use_the_dequantized_weight(dtype: torch.dtype) -> None:
    layer = NF4Linear(make_dense(dtype=dtype))
    x = torch.randn(3, 128, dtype=dtype, requires_grad=True)
    output = layer(x)
    torch.testing.assert_close(output, linear(x, layer.dequantize(), layer.bias))
    gradient = torch.randn_like(output)
    output.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ layer.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_evaluation_without_gradient_does_not_spoil_training(dtype: torch.dtype) -> None:
    layer = NF4Linear(make_dense(dtype=dtype)).eval()
    before, weight = layer.weight.data.clone(), layer.dequantize()
    x = torch.randn(4, 128, dtype=dtype)
    with torch.no_grad():
        evaluated = layer(x)
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(layer.dequantize(), weight)
    x.requires_grad_()
    trained = layer.train()(x)
    torch.testing.assert_close(trained, evaluated)
    trained.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(trained) @ weight)


@pytest.mark.parametrize("shape", [(64, 128), (1, 64), (33, 72), (130, 1024), (3, 7)])
def test_bytes_equal_the_closed_form(shape: tuple[int, int]) -> None:
    layer = NF4Linear(make_dense(*shape))
    state = layer.weight.quant_state
    metadata = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    codes_bytes, metadata_bytes = BitsAndBytesBackend(QuantizerSettings()).num_bytes(*shape, 4, "layer")
    assert codes_bytes == layer.weight.nbytes
    assert metadata_bytes == sum(tensor.nbytes for tensor in metadata)


def test_the_dense_layer_is_left_alone() -> None:
    dense = make_dense()
    before = dense.weight.detach().clone()
    layer = NF4Linear(dense)
    assert torch.equal(dense.weight, before)
    assert layer.bias is dense.bias


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_keeps_the_guard(copied) -> None:
    layer = NF4Linear(make_dense()).eval()
    twin = copied(layer)
    x = torch.randn(3, 128)
    with torch.no_grad():
        assert torch.equal(twin(x), layer(x))
    assert twin.support_avx512bf16_for_cpu is False


def test_the_dtype_of_the_dense_weight_follows_the_module() -> None:
    layer = NF4Linear(make_dense())
    weight = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.dequantize().dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), weight.bfloat16())
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    torch.testing.assert_close(dense_layer(layer)(x), layer(x))


@pytest.mark.parametrize("storage", DTYPES)
def test_codes_seen_as_another_dtype_are_the_same_weight(storage: torch.dtype) -> None:
    layer = NF4Linear(make_dense())
    x = torch.randn(3, 128, requires_grad=True)
    expected, codes = layer(x), layer.weight.data.clone()
    layer.store_codes_as(storage, torch.device("cpu"))
    assert layer.weight.dtype == storage
    assert torch.equal(layer.weight.data.view(torch.uint8).view(-1), codes.view(-1))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.dequantize(), NF4Linear(make_dense()).dequantize())
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand_as(x))


def test_codes_that_are_no_whole_number_of_values_stay_bytes() -> None:
    dense = make_dense(rows=1, columns=6)  # 3 bytes
    layer = NF4Linear(dense)
    layer.store_codes_as(torch.bfloat16, torch.device("cpu"))
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(layer.dequantize(), NF4Linear(dense).dequantize())
