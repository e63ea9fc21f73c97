"""The CUDA kernels against the PyTorch formula: by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from peft_autoqra.plan import QuantizerSettings
from peft_autoqra.quant.backends import NativeBackend
from peft_autoqra.quant.packing import NATIVE_BITS


def test_equal_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    # In a process of its own: Triton reads the variable at import, and torch.compile may have imported it.
    script = Path(__file__).with_name("triton_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    completed = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr


@pytest.mark.gpu
def test_equal_on_the_gpu() -> None:
    pytest.importorskip("triton")
    from tests.quant import triton_interpreter  # noqa: PLC0415 - optional dependency

    triton_interpreter.check("cuda", (torch.float32, torch.float16, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4, 5])
@pytest.mark.parametrize("bits", NATIVE_BITS)
def test_generation_and_training_agree_on_the_gpu(bits: int, num_tokens: int) -> None:
    layer = NativeBackend(QuantizerSettings(group_size=64)).quantize(nn.Linear(256, 96).cuda(), bits, None, "layer")
    x = torch.randn(num_tokens, 256, device="cuda", requires_grad=True)
    with torch.no_grad():
        served = layer(x)
    trained = layer(x)
    torch.testing.assert_close(served, trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trained, linear(x, layer.dequantize(), layer.bias), rtol=1e-4, atol=1e-4)
