"""Calibration files that are broken, or written to do harm."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from peft_autoqra.errors import InvalidPlanError, PlanMismatchError
from peft_autoqra.plan import BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import CALIBRATION_FILE, Correction, PlanCalibration, StoredCodes, _checksum
from peft_autoqra.quant.backends import make_backend
from peft_autoqra.quant.quantized_weight import WeightFormat
from tests.hostile_files import little_memory, nested, write_raw

pytestmark = pytest.mark.timeout(30)

MOMENT, LEFT, RIGHT = "input_second_moment:a", "correction_left:a", "correction_right:a"
GOOD: dict[str, Any] = {
    MOMENT: np.ones(64, np.float32),
    LEFT: np.ones((32, 4), np.float16),
    RIGHT: np.ones((4, 64), np.float16),
}
CODES = {f"{kind}:a": np.zeros(8, np.uint8) for kind in ("codes", "scale_codes", "scale_base")}
SHAPES = {"a": (32, 64)}


def save(folder: Path, tensors: dict[str, Any]) -> Path:
    """With a right checksum."""
    path = folder / CALIBRATION_FILE
    save_file(tensors, path, metadata={"autoqra_checksum": _checksum(tensors)})
    return path


def test_the_good_one_is_read(tmp_path: Path) -> None:
    calibration = PlanCalibration.load(save(tmp_path, GOOD | CODES), shapes=SHAPES)
    assert calibration.corrections["a"].rank == 4
    assert calibration.codes["a"].codes.shape == (8,)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({MOMENT: np.ones(64)}, "F64"),
        ({MOMENT: np.ones(64, np.complex64)}, "C64"),
        ({MOMENT: np.ones((8, 8), np.float32)}, r"\[8, 8\]"),
        ({LEFT: np.ones((32, 4), np.float32)}, "F32"),
        ({LEFT: np.ones((32, 3), np.float16)}, "two ranks"),
        ({RIGHT: np.ones(64, np.float16)}, r"\[64\]"),
        (CODES | {"codes:a": np.zeros(8, np.int8)}, "I8"),
        (CODES | {"codes:a": np.zeros(8, bool)}, "BOOL"),
        ({"codes:a": np.zeros(8, np.uint8)}, "parts of some"),
        ({MOMENT: np.full(64, np.nan, np.float32)}, "not finite"),
        ({MOMENT: np.full(64, np.inf, np.float32)}, "not finite"),
        ({MOMENT: np.full(64, -1, np.float32)}, "negative"),
        ({LEFT: np.full((32, 4), np.inf, np.float16)}, "not finite"),
        ({RIGHT: np.full((4, 64), np.nan, np.float16)}, "not finite"),
        ({"moment:a": np.ones(3, np.float32)}, "unknown tensor"),
        ({"input_second_moment:../a": np.ones(3, np.float32)}, "names the module '../a'"),
    ],
)
def test_bad_tensors_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidPlanError, match=match):
        PlanCalibration.load(save(tmp_path, GOOD | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {MOMENT: np.ones(63, np.float32)},
        {LEFT: np.ones((31, 4), np.float16)},
        {RIGHT: np.ones((4, 65), np.float16)},
        {LEFT: np.ones((32, 33), np.float16), RIGHT: np.ones((33, 64), np.float16)},
        CODES | {"codes:a": np.zeros(32 * 64 + 1, np.uint8)},
    ],
)
def test_tensors_of_another_weight_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = save(tmp_path, GOOD | changes)
    PlanCalibration.load(path)
    with pytest.raises(PlanMismatchError, match=r"'a', whose weight has shape \(32, 64\)"):
        PlanCalibration.load(path, shapes=SHAPES)


def test_tensors_of_modules_that_the_plan_does_not_know_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, GOOD | {"input_second_moment:b": np.ones(64, np.float32)})
    PlanCalibration.load(path)
    with pytest.raises(PlanMismatchError, match=r"tensors of \['b'\], of which the plan gives no shape"):
        PlanCalibration.load(path, shapes=SHAPES)


def test_the_codes_of_many_modules_are_read_again(tmp_path: Path) -> None:
    names = [f"model.layers.{index // 200}.mlp.experts.{index % 200}.down_proj" for index in range(20_000)]
    byte = np.zeros(1, np.uint8)
    stored = StoredCodes(codes=byte, scale_codes=byte, scale_base=byte)
    calibration = PlanCalibration(
        codes=dict.fromkeys(names, stored), input_second_moments=dict.fromkeys(names, np.ones(1, np.float32))
    )
    calibration.save(tmp_path)
    again = PlanCalibration.load(tmp_path / CALIBRATION_FILE, calibration.digest)
    assert list(again.codes) == sorted(names)


def test_a_hole_of_64_gigabytes(tmp_path: Path) -> None:
    """Its one module has no shape that could be compared."""
    size = 2**36
    table = {"__metadata__": {"autoqra_checksum": "0"}}
    for index, key in enumerate(CODES):
        table[key] = {"dtype": "U8", "shape": [size], "data_offsets": [index * size, (index + 1) * size]}
    write_raw(tmp_path / CALIBRATION_FILE, table, data_bytes=3 * size)
    with little_memory(), pytest.raises(InvalidPlanError, match=r"bytes only .* are stored"):
        PlanCalibration.load(tmp_path / CALIBRATION_FILE, "0")


def test_a_billion_inputs(tmp_path: Path) -> None:
    billion = 10**9
    entry = {"dtype": "F32", "shape": [billion], "data_offsets": [0, 4 * billion]}
    path = tmp_path / CALIBRATION_FILE
    write_raw(path, {"__metadata__": {"autoqra_checksum": "0"}, MOMENT: entry}, data_bytes=4 * billion)
    with little_memory(), pytest.raises(InvalidPlanError, match=r"bytes only .* are stored"):
        PlanCalibration.load(path, "0", SHAPES)


def test_more_inputs_than_the_plan_says(tmp_path: Path) -> None:
    """Few enough that the hole is not looked for."""
    million = 10**6
    entry = {"dtype": "F32", "shape": [100 * million], "data_offsets": [0, 400 * million]}
    path = tmp_path / CALIBRATION_FILE
    write_raw(path, {"__metadata__": {"autoqra_checksum": "0"}, MOMENT: entry}, data_bytes=400 * million)
    with little_memory(), pytest.raises(PlanMismatchError, match="100000000"):
        PlanCalibration.load(path, "0", SHAPES)
    with little_memory(), pytest.raises(PlanMismatchError, match="another plan"):
        PlanCalibration.load(path, "1")


def test_more_tensors_than_any_calibration_has(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ",".join(f'"codes:{index}":{entry}' for index in range(2**19 + 1))
    write_raw(tmp_path / CALIBRATION_FILE, f"{{{header}}}".encode())
    with little_memory(), pytest.raises(InvalidPlanError, match="commas, the most that is read"):
        PlanCalibration.load(tmp_path / CALIBRATION_FILE)


@pytest.mark.parametrize("kind", ["empty", "page", "deep", "folder", "loop", "nothing"])
def test_no_calibration_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / CALIBRATION_FILE
    if kind in ("empty", "page", "deep"):
        path.write_bytes({"empty": b"", "page": b"<html></html>", "deep": nested(10_000).encode()}[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(InvalidPlanError, match=CALIBRATION_FILE):
        PlanCalibration.load(path)


def test_a_plan_with_the_calibration_of_other_shapes(tmp_path: Path) -> None:
    plan = BitRankPlan({"a": LayerPlan(3, 2)}, shapes={"a": (32, 32)}, calibration=PlanCalibration())
    moments = {"a": np.ones(64, np.float32)}
    plan.replace(calibration=PlanCalibration(input_second_moments=moments)).save_pretrained(tmp_path)
    with pytest.raises(PlanMismatchError, match=r"shape \(32, 32\)"):
        BitRankPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["length", "shape", "scale"])
@pytest.mark.parametrize("bits", [3, 8])
def test_codes_that_no_layer_could_be_made_of(damage: str, bits: int) -> None:
    shapes = WeightFormat(bits, 32, 16, 64).tensor_shapes
    parts = {k: np.zeros(s, np.uint8) for k, s in zip(("codes", "scale_codes", "scale_base"), shapes, strict=True)}
    backend = make_backend(QuantizerSettings(backend="gptq", group_size=32))
    correction = Correction(left=np.zeros((16, 1), np.float16), right=np.zeros((1, 64), np.float16))
    whole = PlanCalibration(codes={"a": StoredCodes(**parts)}, corrections={"a": correction})
    backend.check(16, 64, bits, whole.module("a"), "a")
    if damage == "length":
        parts["codes"] = parts["codes"][:-1]
    elif damage == "shape":
        parts["scale_base"] = parts["scale_base"].reshape(-1, 1)
    else:
        parts["scale_base"] = np.full_like(parts["scale_base"], 255)
    with pytest.raises(InvalidPlanError, match="'a'"):
        backend.check(16, 64, bits, PlanCalibration(codes={"a": StoredCodes(**parts)}).module("a"), "a")
