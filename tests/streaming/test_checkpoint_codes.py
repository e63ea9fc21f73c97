"""A quantized checkpoint whose files and config.json do not go together is refused before its tensors are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from peft_autoqra import AutoQRAQuantConfig
from peft_autoqra.errors import InvalidPlanError
from tests.conftest import TinyLlamaFactory
from tests.hostile_files import little_memory, read_raw, write_raw
from tests.streaming.bases import load_dense, load_streaming, save_base

pytestmark = pytest.mark.timeout(60)

NAME = "model.layers.0.mlp.up_proj"
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def quantized(tiny_llama: TinyLlamaFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    base = save_base(tiny_llama, folder)
    config = AutoQRAQuantConfig(bits=3, bits_pattern={r"layers\.1\..*": 8})
    load_streaming(base, config).save_pretrained(folder / "native")
    load_streaming(base, AutoQRAQuantConfig(bits=8, quant_backend="bitsandbytes")).save_pretrained(folder / "int8")
    return folder


def copied(source: Path, folder: Path, changes: dict[str, Change], forgotten: str | None = None) -> Path:
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["modules"].pop(forgotten, None)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


DAMAGES: dict[str, tuple[str, Change]] = {
    "float codes": ("W_q", Tensor.float),
    "bool codes": ("W_q", Tensor.bool),
    "signed codes": ("W_q", Tensor.char),
    "short codes": ("W_q", lambda tensor: tensor[:-1].clone()),
    "codes of two dimensions": ("W_q", lambda tensor: tensor[None].clone()),
    "half scale codes": ("scale_codes", Tensor.half),
    "float scale base": ("scale_base", Tensor.float),
    "long scale base": ("scale_base", lambda tensor: torch.cat([tensor, tensor])),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_codes_of_another_kind(quantized: Path, tmp_path: Path, damage: str, ignore_mismatched_sizes: bool) -> None:
    kind, change = DAMAGES[damage]
    folder = copied(quantized / "native", tmp_path / "damaged", {f"{NAME}.{kind}": change})
    for model_class in (AutoModel, type(load_dense(quantized / "native"))):  # one reads the names without a prefix
        with pytest.raises(InvalidPlanError, match=rf"holds '{NAME}.{kind}' as .*save or download"):
            model_class.from_pretrained(folder, ignore_mismatched_sizes=ignore_mismatched_sizes)


@pytest.mark.parametrize(("backend", "kind"), [("native", "scale_base"), ("int8", "scale_bytes")])
def test_scales_that_are_no_numbers(quantized: Path, tmp_path: Path, backend: str, kind: str) -> None:
    folder = copied(quantized / backend, tmp_path / "damaged", {f"{NAME}.{kind}": lambda t: torch.full_like(t, 255)})
    with pytest.raises(InvalidPlanError, match=f"scales of '{NAME}' are not finite"):
        load_dense(folder)


def test_scales_that_overflow_when_they_are_decoded(quantized: Path, tmp_path: Path) -> None:
    """Each byte is of a finite number."""
    largest = lambda base: torch.full((base.numel() // 2,), 3e38, dtype=torch.bfloat16).view(torch.uint8).view_as(base)  # noqa: E731
    folder = copied(quantized / "native", tmp_path / "damaged", {f"{NAME}.scale_base": largest})
    with pytest.raises(InvalidPlanError, match=f"scales of '{NAME}' are not finite"):
        load_dense(folder)


@pytest.mark.parametrize("backend", ["native", "int8"])
def test_a_layer_that_the_configuration_forgot(quantized: Path, tmp_path: Path, backend: str) -> None:
    folder = copied(quantized / backend, tmp_path / "damaged", {}, forgotten=NAME)
    with pytest.raises(
        InvalidPlanError, match=rf"codes of 14 layers and config\.json lists 13; it lacks \['{NAME}'\]"
    ):
        load_dense(folder)
    with pytest.raises(InvalidPlanError, match=r"codes of 14 layers and config\.json lists 13"):
        AutoModel.from_pretrained(folder)


def test_a_billion_codes(quantized: Path, tmp_path: Path) -> None:
    folder = copied(quantized / "native", tmp_path / "damaged", {})
    header, data = read_raw(folder / "model.safetensors")
    billion = 10**9
    header[f"{NAME}.W_q"] = {
        "dtype": "U8",
        "shape": [billion],
        "data_offsets": [len(data), len(data) + billion],
    }
    old = json.loads(json.dumps(read_raw(folder / "model.safetensors")[0]))[f"{NAME}.W_q"]["data_offsets"]
    header["hole"] = {"dtype": "U8", "shape": [old[1] - old[0]], "data_offsets": old}  # no byte may be left out
    write_raw(folder / "model.safetensors", header, data, data_bytes=len(data) + billion)
    with little_memory(), pytest.raises(InvalidPlanError, match=r"U8 \[1000000000\]"):
        load_dense(folder)


@pytest.mark.parametrize(
    "module",
    [
        {"shape": [10**9, 10**9]},
        {"shape": [128.0, 64.0]},
        {"shape": [-128, 64]},
        {"shape": "ab"},
        {"shape": None},
        {"group_size": 2**70},
        {"group_size": 1},
        {"group_size": True},
        {"calibration_digest": 3},
        {"bits": True},
        {"surprise": 3},
    ],
    ids=str,
)
def test_modules_that_claim_what_no_layer_has(quantized: Path, tmp_path: Path, module: dict[str, Any]) -> None:
    folder = copied(quantized / "native", tmp_path / "damaged", {})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"][NAME] |= module
    (folder / "config.json").write_text(json.dumps(config))
    with little_memory(), pytest.raises(InvalidPlanError, match=f"'{NAME}'.*ave or download the model again"):
        load_dense(folder)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits_pattern": {"(a+)+$": 4}}, "of the file"),
        ({"target_modules": ".*.*.*.*x"}, "of the file"),
        ({"plan": "someone/plan"}, "no plan by name"),
    ],
)
def test_what_a_file_may_not_bring(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidPlanError, match=match):
        AutoQRAQuantConfig.from_dict(settings)
