"""bitsandbytes' row-wise int8, computed with the decoded weight in training and evaluation alike."""

import copy
import io
import pickle
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant.backends import BitsAndBytesBackend, dense_layer
from peft_autoqra.quant.int8 import Int8Linear
from tests.quant.dense_reference import assert_computes_as_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = 64, 128


def make_dense(
    rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias, dtype=dtype)


def scales(layer: Int8Linear) -> Tensor:
    return layer.scale_bytes.view(torch.float32)


# ----------------------------------------------------------------------------------------------- the format is theirs


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    dense = make_dense(dtype=dtype)
    layer = Int8Linear(dense)
    codes, row_max, _ = bnb.functional.int8_vectorwise_quant(dense.weight.detach())
    assert torch.equal(layer.W_q, codes)
    assert torch.equal(scales(layer), row_max)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizes_to_what_bitsandbytes_itself_decodes(dtype: torch.dtype) -> None:
    layer = Int8Linear(make_dense(dtype=dtype))
    expected = bnb.functional.int8_vectorwise_dequant(layer.W_q.data, scales(layer))
    torch.testing.assert_close(layer.dequantize(torch.float32), expected, rtol=3e-7, atol=0)
    assert layer.dequantize().dtype == dtype
    assert torch.equal(layer.dequantize(), layer.dequantize(torch.float32).to(dtype))


# Of 16-bit weights only: Linear8bitLt rounds a weight to float16 first, which is exact for these.
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_computes_what_linear8bitlt_computes_in_training_on_cpus(dtype: torch.dtype) -> None:
    dense = make_dense(dtype=dtype)
    theirs = bnb.nn.Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=False)
    theirs.weight = bnb.nn.Int8Params(dense.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    theirs.bias = dense.bias
    theirs = theirs.to("cpu").train()
    x, twin = (torch.linspace(-1, 1, 3 * COLUMNS, dtype=dtype).view(3, COLUMNS).requires_grad_() for _ in range(2))
    layer = Int8Linear(dense)
    ours, expected = layer(x), theirs(twin)
    assert torch.equal(ours, expected)
    ours.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    dense = make_dense(dtype=dtype)
    with torch.no_grad():
        dense.weight *= torch.logspace(-3, 2, ROWS, dtype=dtype)[:, None]
    layer = Int8Linear(dense)
    weight = dense.weight.detach().double()
    half_step = weight.abs().amax(1) / 254
    error = (weight - layer.dequantize(torch.float32).double()).abs().amax(1)
    assert (error <= half_step * (1 + 1e-4)).all()  # float32 rounds the quotient
    assert (error > half_step * 0.7).all()
    assert (layer.W_q.abs().amax(1) == 127).all()


@pytest.mark.parametrize("row", [0.0, -0.0, 1e-40, 1e-37, 3e38])
def test_rows_of_zeros_and_of_extreme_magnitude_stay_finite(row: float) -> None:
    dense = make_dense()
    with torch.no_grad():
        dense.weight[3] = row
    layer = Int8Linear(dense)
    decoded = layer.dequantize()
    assert torch.isfinite(decoded).all()
    torch.testing.assert_close(decoded[3], dense.weight[3].detach(), rtol=1e-6, atol=1e-36)
    x = torch.zeros(2, COLUMNS, requires_grad=True)
    layer(x)[:, 3].sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(64, 128), (1, 64), (33, 72), (130, 1024), (3, 7)])
def test_bytes_equal_the_closed_form(shape: tuple[int, int]) -> None:
    layer = BitsAndBytesBackend(QuantizerSettings()).quantize(make_dense(*shape), 8, None, "layer")
    assert isinstance(layer, Int8Linear)
    assert (layer.W_q.shape, layer.W_q.dtype, layer.scale_bytes.shape) == (shape, torch.int8, (4 * shape[0],))
    num_bytes = BitsAndBytesBackend(QuantizerSettings()).num_bytes(*shape, 8, "layer")
    assert num_bytes == (layer.W_q.nbytes, layer.scale_bytes.nbytes)
    assert sum(tensor.untyped_storage().nbytes() for name, tensor in layer.state_dict().items() if name != "bias") == (
        shape[0] * shape[1] + 4 * shape[0]
    )


# ----------------------------------------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("shape", [(COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_equal_the_dense_layer_to_the_last_bit(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    assert_computes_as_dense(Int8Linear(make_dense(dtype=dtype, bias=bias)), shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_and_evaluation_compute_the_same(dtype: torch.dtype) -> None:
    layer = Int8Linear(make_dense(dtype=dtype))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(4, COLUMNS, dtype=dtype)
    x[:, 5] *= 40  # an outlier, which LLM.int8() would treat apart
    with torch.no_grad():
        evaluated = layer.eval()(x)
    with torch.inference_mode():
        served = layer(x)
    trained = layer.train()(x.requires_grad_())
    assert torch.equal(trained, evaluated)
    assert torch.equal(trained, served)
    trained.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(trained) @ layer.dequantize())
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_autograd_keeps_nothing_dense() -> None:
    layer = Int8Linear(make_dense())
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, COLUMNS, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {layer.W_q.data_ptr(), layer.scale_bytes.data_ptr()}


def test_nothing_but_the_bias_can_be_trained() -> None:
    layer = Int8Linear(make_dense())
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]
    assert not list(layer.buffers())  # DDP would broadcast them at every step
    layer.requires_grad_(False)
    layer(torch.randn(3, COLUMNS, requires_grad=True)).sum().backward()
    assert layer.bias.grad is None
    assert not layer(torch.randn(3, COLUMNS)).requires_grad


def test_autocast_computes_in_its_dtype() -> None:
    layer = Int8Linear(make_dense())
    x = torch.randn(5, COLUMNS, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        dense = linear(x, layer.dequantize(), layer.bias)
    assert output.dtype == dense.dtype == torch.bfloat16
    assert torch.equal(output, dense)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_identical_gradients(reentrant: bool) -> None:
    layer = Int8Linear(make_dense())
    x = torch.randn(4, COLUMNS, requires_grad=True)
    layer(x).pow(2).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiles_to_one_graph() -> None:
    layer = Int8Linear(make_dense())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, twin = (torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).requires_grad_() for _ in range(2))
    torch.testing.assert_close(compiled(x), layer(twin))
    compiled(x).sum().backward()
    layer(twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


# ----------------------------------------------------------------------------------------------- moved, copied, saved


def test_the_dense_layer_is_left_alone() -> None:
    dense = make_dense()
    before = dense.weight.detach().clone()
    layer = Int8Linear(dense)
    assert torch.equal(dense.weight, before)
    assert dense.weight.requires_grad
    assert layer.bias is dense.bias
    assert (layer.in_features, layer.out_features, layer.bits) == (COLUMNS, ROWS, 8)
    assert "bits=8" in repr(layer)


def test_changing_the_dtype_rounds_neither_codes_nor_scales() -> None:
    layer = Int8Linear(make_dense(bias=False))
    weight = layer.dequantize()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16).half().double().float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer.dequantize(), weight)


def test_the_compute_dtype_follows_the_module() -> None:
    layer = Int8Linear(make_dense())
    weight = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.dequantize().dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), weight.bfloat16())
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(dense_layer(layer)(x), layer(x))


def through_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save]
)
def test_a_copy_computes_the_same(copied) -> None:
    layer = Int8Linear(make_dense(dtype=torch.bfloat16)).eval()
    twin = copied(layer)
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(twin(x), layer(x))
    assert twin.W_q.data_ptr() != layer.W_q.data_ptr()
    assert twin.dequantize().dtype == torch.bfloat16
    assert not twin.training


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool) -> None:
    layer, other = Int8Linear(make_dense()), Int8Linear(nn.Linear(COLUMNS, ROWS))
    other.load_state_dict(layer.state_dict(), strict=True, assign=assign)
    assert torch.equal(other.dequantize(), layer.dequantize())
    assert torch.equal(other(torch.ones(COLUMNS)), layer(torch.ones(COLUMNS)))


def test_safetensors_round_trip(tmp_path: Path) -> None:
    layer, other = Int8Linear(make_dense()), Int8Linear(nn.Linear(COLUMNS, ROWS))
    save_model(layer, str(tmp_path / "layer.safetensors"))
    load_model(other, str(tmp_path / "layer.safetensors"))
    assert torch.equal(other.dequantize(), layer.dequantize())


def test_a_layer_on_the_meta_device_takes_a_saved_weight() -> None:
    layer = Int8Linear(make_dense())
    empty = Int8Linear(nn.Linear(COLUMNS, ROWS, device="meta"))
    assert empty.W_q.device == empty.scale_bytes.device == torch.device("meta")
    assert (empty.W_q.shape, empty.scale_bytes.shape) == (layer.W_q.shape, layer.scale_bytes.shape)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(empty.dequantize(), layer.dequantize())
    assert layer.to("meta").dequantize().device == torch.device("meta")
