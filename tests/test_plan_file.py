"""Plan files that are broken, or written to do harm: refused quickly, with the file's name, as one kind of error."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from peft_autoqra import plan_file, safetensors_file
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.module_names import MAX_MODULES
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan
from peft_autoqra.plan_calibration import PlanCalibration
from peft_autoqra.plan_file import ADAPTER_FILE, PLAN_FILE, checksum
from peft_autoqra.safetensors_file import MAX_HEADER_BYTES, check_can_be_read
from peft_autoqra.tuner.config import AutoQRAConfig
from tests.hostile_files import little_memory, nested, read_raw, write_raw

pytestmark = pytest.mark.timeout(30)

PLAN = BitRankPlan(
    {"a.q_proj": LayerPlan(3, 4), "a.k_proj": LayerPlan(16, 0)},
    shapes={"a.q_proj": (32, 64), "a.k_proj": (16, 64)},
    base_model=BaseModelInfo(name_or_path="me/base"),
    provenance={"seed": 0},
)
CONTENT: dict[str, Any] = json.loads(PLAN.to_metadata()["autoqra_plan"])
TENSORS = {"bits": np.array([3, 16], np.int32), "rank": np.array([4, 0], np.int32)}
BILLION = 10**9
OTHER_FILES = {
    "empty": b"",
    "zeros": b"\0" * 64,
    "ones": b"\xff" * 64,
    "pickle": pickle.dumps({"bits": [3]}),
    "page": b"<!DOCTYPE html><html>404</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}
PLACES: dict[str, Any] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "nothing": lambda path: None,
}


def sealed(text: str, **others: str) -> dict[str, str]:
    """A header with a right checksum."""
    metadata = PLAN.to_metadata() | {"autoqra_plan": text} | others
    return metadata | {"autoqra_checksum": checksum(metadata)}


def changed(**changes: Any) -> dict[str, str]:
    return sealed(json.dumps(CONTENT | changes))


def refused(folder: Path, match: str | None = None) -> None:
    """It is refused for a reason that names the file, within little memory."""
    with little_memory(), pytest.raises(InvalidPlanError, match=match) as raised:
        BitRankPlan.from_pretrained(folder)
    message = str(raised.value)
    assert str(folder) in message
    assert len(message) < 1500
    assert any(word in message for word in ("save", "download", "give", "put", "upgrade"))


# ------------------------------------------------------------------------------------------------------ large claims


def test_a_billion_modules(tmp_path: Path) -> None:
    table = {
        name: {"dtype": "I32", "shape": [BILLION], "data_offsets": [4 * index * BILLION, 4 * (index + 1) * BILLION]}
        for index, name in enumerate(("bits", "rank"))
    }
    write_raw(tmp_path / PLAN_FILE, {"__metadata__": PLAN.to_metadata()} | table, data_bytes=8 * BILLION)
    refused(tmp_path, "bytes only .* are stored")


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 10**8])
def test_a_header_that_claims_more_than_there_is(tmp_path: Path, claim: int) -> None:
    write_raw(tmp_path / PLAN_FILE, {}, header_bytes=claim)
    refused(tmp_path, "claims a header of")


def test_a_header_of_more_parts_than_any_has(tmp_path: Path) -> None:
    shape = {"dtype": "U8", "shape": [1] * 3_000_000, "data_offsets": [0, 1]}
    write_raw(tmp_path / PLAN_FILE, {"__metadata__": PLAN.to_metadata(), "bits": shape}, b"a")
    refused(tmp_path, "commas, the most that is read is 2097152")


def test_a_header_of_a_hundred_megabytes(tmp_path: Path) -> None:
    write_raw(tmp_path / PLAN_FILE, b"{}", data_bytes=10**8, header_bytes=10**8 - 2)
    refused(tmp_path, "claims a header of")


@pytest.mark.parametrize("part", ["x" * 2**25, "[]," * 2**19, "0," * 3 * 2**19, '{"a":0},' * 2**18], ids=len)
def test_more_text_or_parts_than_any_plan_has(tmp_path: Path, part: str) -> None:
    text = json.dumps(CONTENT | {"provenance": ["HERE"]}).replace('"HERE"', part.rstrip(",") or "[]")
    write_raw(tmp_path / PLAN_FILE, {"__metadata__": sealed(text)})
    refused(tmp_path, "more than any plan has")


def test_more_modules_than_any_model_has(tmp_path: Path) -> None:
    many = MAX_MODULES + 1
    header = changed(modules=[str(index) for index in range(many)], bits=[4] * many, rank=[1] * many, shapes={})
    write_raw(tmp_path / PLAN_FILE, {"__metadata__": header})
    refused(tmp_path, f"names {many} modules; at most {MAX_MODULES}")
    with pytest.raises(InvalidPlanError, match=f"names {many} modules; at most {MAX_MODULES}"):
        BitRankPlan({str(index): LayerPlan(4, 1) for index in range(many)}).save_pretrained(tmp_path)


def test_a_plan_of_a_large_mixture_of_experts_is_read_again(tmp_path: Path) -> None:
    names = [
        f"model.language_model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"
        for layer in range(55)
        for expert in range(384)
        for kind in ("gate", "up", "down")
    ]
    layers = {name: LayerPlan((2, 3, 4)[index % 3], 8) for index, name in enumerate(names)}
    plan = BitRankPlan(layers, shapes=dict.fromkeys(names, (7168, 2048)))
    plan._save_pretrained(tmp_path)  # without its card
    again = BitRankPlan.from_pretrained(tmp_path)
    assert (len(again), again, again.shapes) == (63_360, plan, plan.shapes)


def test_an_adapter_of_many_modules_is_read(tmp_path: Path) -> None:
    """Its header holds the plan and two tensors a module; here they are empty."""
    names = [f"model.layers.{index // 200}.mlp.experts.{index % 200}.down_proj" for index in range(20_000)]
    plan = BitRankPlan(dict.fromkeys(names, LayerPlan(4, 8)), shapes=dict.fromkeys(names, (7168, 2048)))
    tensors = {f"base_model.model.{n}.lora_{ab}.weight": np.zeros((0, 2048), np.float32) for n in names for ab in "AB"}
    save_file(tensors, tmp_path / ADAPTER_FILE, metadata=plan.to_metadata())
    assert BitRankPlan.from_pretrained(tmp_path) == plan


def test_nothing_is_written_that_could_not_be_read() -> None:
    for provenance in ({"log": "x" * 2**25}, {"nested": json.loads(nested(40))}):
        with pytest.raises(InvalidPlanError, match=r"(at most 33554432|more than 32 levels).*provenance"):
            PLAN.replace(provenance=provenance).to_metadata()


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ("MAX_TENSORS", r"10 tensors, .* is 9;"),
        ("MAX_HEADER_BYTES", r"\d+ bytes of header, .* is 9;"),
        ("_MAX_COMMAS", r"\d+ commas in its header, .* is 9;"),
    ],
)
def test_headers_that_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, match: str
) -> None:
    shapes = {str(index): (2, 3) for index in range(10)}
    check_can_be_read(tmp_path / PLAN_FILE, shapes, {"a": "b"})
    monkeypatch.setattr(safetensors_file, limit, 9)
    with pytest.raises(InvalidPlanError, match=match):
        check_can_be_read(tmp_path / PLAN_FILE, shapes, {"a": "b"})
    save_file({name: np.zeros(shape) for name, shape in shapes.items()}, tmp_path / PLAN_FILE)
    with (
        pytest.raises(InvalidPlanError, match="the most that is read is 9"),
        safetensors_file.open_safetensors(tmp_path / PLAN_FILE) as file,
    ):
        safetensors_file.tensor_entries(file, tmp_path / PLAN_FILE)


def test_no_file_is_written_that_could_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a.lora_A.weight": np.zeros(1)}, tmp_path / ADAPTER_FILE)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 500)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    config = AutoQRAConfig(plan=PLAN)
    calibration = PlanCalibration(input_second_moments={f"a.{index}": np.zeros(1, np.float32) for index in range(20)})
    for save in (PLAN._save_pretrained, calibration.save):
        with pytest.raises(InvalidPlanError, match=r"would hold .* is 500;"):
            save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(InvalidPlanError, match=r"would hold .* is 500;"):
        config.save_pretrained(str(tmp_path))
    assert (tmp_path / ADAPTER_FILE).read_bytes() == before[tmp_path / ADAPTER_FILE]


# ------------------------------------------------------------------------------------------------------------ content


@pytest.mark.parametrize("depth", [40, 900, 100_000])
def test_deep_nesting(tmp_path: Path, depth: int) -> None:
    text = json.dumps(CONTENT | {"provenance": {"nested": "HERE"}}).replace('"HERE"', nested(depth))
    write_raw(tmp_path / PLAN_FILE, {"__metadata__": sealed(text)})
    refused(tmp_path)
    write_raw(tmp_path / PLAN_FILE, nested(depth).encode())
    refused(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CONTENT)[:-1] + ', "bits": [2, 2]}',
        json.dumps(CONTENT).replace('"a.q_proj": [', '"a.q_proj": [16, 16], "a.q_proj": ['),
        json.dumps(CONTENT | {"modules": ["a.q_proj", "a.q_proj"], "shapes": {}}),
    ],
)
def test_nothing_is_named_twice(text: str) -> None:
    with pytest.raises(InvalidPlanError, match="twice"):
        BitRankPlan.from_metadata(sealed(text), "here")


@pytest.mark.parametrize("number", ["1e400", "NaN", "-1", str(2**70), "9" * 5000, "true", "4.0", "null", '"4"', "[4]"])
@pytest.mark.parametrize("field", ["bits", "rank", "shape", "memory", "group_size"])
def test_numbers_that_are_none(field: str, number: str) -> None:
    places = {
        "bits": CONTENT | {"bits": ["HERE", 16]},
        "rank": CONTENT | {"rank": ["HERE", 0]},
        "shape": CONTENT | {"shapes": {"a.k_proj": [64, "HERE"]}},
        "memory": CONTENT | {"memory": dict.fromkeys(("weight_bytes", "metadata_bytes"), "HERE")},
        "group_size": CONTENT | {"quantizer": {"backend": "native", "group_size": "HERE"}},
    }
    if (field, number) == ("group_size", str(2**70)):
        return  # a power of two: halved until it divides
    text = json.dumps(places[field]).replace('"HERE"', number)
    with pytest.raises(InvalidPlanError, match="in here is damaged"):
        BitRankPlan.from_metadata(sealed(text), "here")


@pytest.mark.parametrize(
    "shape", [[0, 64], [-32, 64], [2**31, 64], [32], [32, 64, 1], [32.0, 64], "ab", None, [2, 64]]
)
def test_shapes_that_no_weight_has_or_that_the_rank_exceeds(shape: Any) -> None:
    with pytest.raises(InvalidPlanError, match=r"in here is damaged.*a\.q_proj"):
        BitRankPlan.from_metadata(changed(shapes={"a.q_proj": shape}), "here")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x1b[2J", "a..b", ".a", "a.", "", "x" * 600, 3]
)
def test_names_that_no_module_has(name: Any) -> None:
    with pytest.raises(InvalidPlanError, match="in here is damaged") as raised:
        BitRankPlan.from_metadata(changed(modules=[name, "b"], shapes={}), "here")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("value", [3, None, [], {}])
def test_metadata_from_json_that_is_no_text(value: Any) -> None:
    for key in PLAN.to_metadata():
        with pytest.raises(InvalidPlanError, match="here"):
            BitRankPlan.from_metadata(PLAN.to_metadata() | {key: value}, "here")


@pytest.mark.parametrize("version", ["0", "9" * 5000, "٣"])
def test_versions_that_no_release_wrote(version: str) -> None:
    with pytest.raises(InvalidPlanError, match="upgrade"):
        BitRankPlan.from_metadata(sealed(json.dumps(CONTENT), autoqra_format_version=version), "here")


# ------------------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": np.array([3, 16], np.float32)},
        {"bits": np.array([3, 16], np.int64)},
        {"bits": np.array([True, False])},
        {"rank": np.array([4, 0], np.complex64)},
        {"rank": np.array([[4, 0]], np.int32)},
        {"rank": np.array([4, 0, 0], np.int32)},
        {"extra": np.zeros(1)},
    ],
)
def test_tensors_of_another_kind(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_file(TENSORS | changes, tmp_path / PLAN_FILE, metadata=PLAN.to_metadata())
    refused(tmp_path, "disagree")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4"])
def test_tensors_of_a_kind_that_numpy_does_not_know(tmp_path: Path, dtype: str) -> None:
    size = {"BF16": 4, "F8_E4M3": 2, "F4": 1}[dtype]
    table = {
        name: {"dtype": dtype, "shape": [2], "data_offsets": [index * size, (index + 1) * size]}
        for index, name in enumerate(TENSORS)
    }
    write_raw(tmp_path / PLAN_FILE, {"__metadata__": PLAN.to_metadata()} | table, b"\0" * 2 * size)
    refused(tmp_path, "disagree")


# ------------------------------------------------------------------------------------------- not a safetensors file


@pytest.mark.parametrize("filename", [PLAN_FILE, ADAPTER_FILE])
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_in_its_place(tmp_path: Path, filename: str, kind: str) -> None:
    (tmp_path / filename).write_bytes(OTHER_FILES[kind])
    refused(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    BitRankPlan({"a": LayerPlan(3, 4)}).save_pretrained(tmp_path)
    content = (tmp_path / PLAN_FILE).read_bytes()
    for length in range(len(content)):
        (tmp_path / PLAN_FILE).write_bytes(content[:length])
        with pytest.raises(InvalidPlanError):
            BitRankPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("filename", [PLAN_FILE, ADAPTER_FILE])
def test_no_file_at_all(tmp_path: Path, filename: str) -> None:
    (tmp_path / filename).mkdir()
    refused(tmp_path, f"no {PLAN_FILE}")
    (tmp_path / filename).rmdir()
    (tmp_path / filename).symlink_to(tmp_path / filename)
    refused(tmp_path, f"no {PLAN_FILE}")
    (tmp_path / filename).unlink()
    os.mkfifo(tmp_path / filename)  # reading it would wait for ever
    refused(tmp_path, f"no {PLAN_FILE}")


@pytest.mark.parametrize("place", PLACES)
def test_what_lies_there_is_no_file(tmp_path: Path, place: str) -> None:
    PLACES[place](tmp_path / PLAN_FILE)
    with pytest.raises(InvalidPlanError, match=PLAN_FILE):
        plan_file.read_header(tmp_path / PLAN_FILE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    PLAN.save_pretrained(tmp_path)
    (tmp_path / PLAN_FILE).chmod(0)
    refused(tmp_path, "permissions")


# ------------------------------------------------------------------------------------------------------ what is well


def test_the_layout_has_not_changed(tmp_path: Path) -> None:
    """Files of earlier releases are read: this is one, by hand."""
    text = (
        '{"modules": ["a"], "bits": [3], "rank": [2], "shapes": {"a": [8, 16]}, "quantizer": {"backend": "native", '
        '"group_size": 64}, "initialization": "zero", "base_model": {"name_or_path": null, "revision": null, '
        '"fingerprint": null}, "memory": null, "provenance": {}}'
    )
    metadata = {"autoqra_format_version": "1", "autoqra_plan": text, "autoqra_calibration_digest": ""}
    metadata["autoqra_checksum"] = "32ea77c74724dd3728f33fb3c07afbb1"
    table = {
        name: {"dtype": "I32", "shape": [1], "data_offsets": [o, o + 4]} for name, o in (("bits", 0), ("rank", 4))
    }
    write_raw(tmp_path / PLAN_FILE, {"__metadata__": metadata} | table, b"\3\0\0\0\2\0\0\0")
    plan = BitRankPlan.from_pretrained(tmp_path)
    assert plan == BitRankPlan({"a": LayerPlan(3, 2)})
    assert plan.shapes == {"a": (8, 16)}
    plan.save_pretrained(tmp_path)
    header, data = read_raw(tmp_path / PLAN_FILE)
    assert header["__metadata__"] == metadata
    assert data == b"\3\0\0\0\2\0\0\0"
