"""The plan: what it refuses, what equality means, and its file."""

import copy
import difflib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from peft_autoqra.errors import AutoQRAError, InvalidPlanError, PlanMismatchError
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import SUPPORTED_BITS, BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.plan_calibration import CALIBRATION_FILE, Correction, PlanCalibration
from peft_autoqra.plan_file import PLAN_FILE, checksum

LAYERS = {
    "layers.0.q_proj": LayerPlan(3, 4),
    "layers.0.down_proj": LayerPlan(16, 0),
    "layers.1.q_proj": LayerPlan(2, 8),
}
SHAPES = {"layers.0.q_proj": (32, 64), "layers.0.down_proj": (64, 128), "layers.1.q_proj": (32, 64)}


def make_calibration() -> PlanCalibration:
    rng = np.random.default_rng(0)
    return PlanCalibration(
        input_second_moments={"layers.0.q_proj": rng.random(64, dtype=np.float32)},
        corrections={
            "layers.0.q_proj": Correction(
                left=rng.standard_normal((32, 4)).astype(np.float16),
                right=rng.standard_normal((4, 64)).astype(np.float16),
            )
        },
    )


def make_plan(**changes: Any) -> BitRankPlan:
    arguments: dict[str, Any] = {
        "layers": LAYERS,
        "shapes": SHAPES,
        "quantizer": QuantizerSettings(group_size=32),
        "initialization": "compensate",
        "base_model": BaseModelInfo(name_or_path="me/base", revision="abc", fingerprint="f" * 32),
        "memory": MemoryEstimate(
            weight_bytes=1, metadata_bytes=2, untouched_bytes=3, adapter_bytes=4, gradient_bytes=5, optimizer_bytes=6
        ),
        "provenance": {"seed": 0, "trials": [1, 2.5, None], "note": "ünïcode"},
    }
    return BitRankPlan(**(arguments | changes))


def assert_same_content(plan: BitRankPlan, other: BitRankPlan) -> None:
    assert plan == other
    assert list(plan) == list(other)
    for name in ("shapes", "quantizer", "initialization", "base_model", "memory", "provenance"):
        assert getattr(plan, name) == getattr(other, name), name


def assert_same_calibration(calibration: PlanCalibration, other: PlanCalibration) -> None:
    assert calibration.input_second_moments.keys() == other.input_second_moments.keys()
    for name, moment in calibration.input_second_moments.items():
        assert np.array_equal(moment, other.input_second_moments[name])
        assert moment.dtype == np.float32
    assert calibration.corrections.keys() == other.corrections.keys()
    for name, correction in calibration.corrections.items():
        assert np.array_equal(correction.left, other.corrections[name].left)
        assert np.array_equal(correction.right, other.corrections[name].right)
        assert correction.rank == other.corrections[name].rank


# ---------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_supported_bits(bits: int) -> None:
    assert LayerPlan(bits, 0).bits == bits


@pytest.mark.parametrize("bits", [0, 1, 5, 32, -4, True, "4", 4.5, 4.0, None, torch.nan])
def test_other_bits_are_refused_with_the_value_and_the_choices(bits: Any) -> None:
    with pytest.raises(InvalidPlanError, match=r"bits=.* choose one of \(2, 3, 4, 8, 16\)") as error:
        LayerPlan(bits, 0)
    assert repr(bits) in str(error.value)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, AutoQRAError)


@pytest.mark.parametrize("rank", [-1, 1.0, 1.5, "8", None, True])
def test_other_ranks_are_refused_with_the_value(rank: Any) -> None:
    with pytest.raises(InvalidPlanError, match=r"rank=.* integer of at least 0"):
        LayerPlan(4, rank)


def test_numpy_integers_become_plain_ones() -> None:
    layer = LayerPlan(np.int64(4), np.int32(8))  # type: ignore[arg-type]
    assert type(layer.bits) is int
    assert type(layer.rank) is int
    assert json.dumps([layer.bits, layer.rank]) == "[4, 8]"
    assert layer == LayerPlan(4, 8)


def test_layer_plans_are_frozen_hashable_and_ordered() -> None:
    layer = LayerPlan(4, 8)
    with pytest.raises(AttributeError):
        layer.bits = 2  # type: ignore[misc]
    assert len({layer, LayerPlan(4, 8), LayerPlan(4, 4)}) == 2
    assert sorted([LayerPlan(4, 8), LayerPlan(2, 64), LayerPlan(4, 0)])[0] == LayerPlan(2, 64)


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("group_size", [0, -64, 4, 7, 12, 100, 64.0, True, "64"])
def test_group_sizes_that_are_no_power_of_two(group_size: Any) -> None:
    with pytest.raises(InvalidPlanError, match="power of two of at least 8"):
        QuantizerSettings(group_size=group_size)


def test_an_unknown_backend() -> None:
    with pytest.raises(InvalidPlanError, match=r"'hqq' is unknown; use one of .*'native'"):
        QuantizerSettings(backend="hqq")  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["name_or_path", "revision"])
@pytest.mark.parametrize("value", ['x")\nimport os', "a\x1b[0m", "a\u2028b", "\ud800", "a" * 4097, 3], ids=ascii)
def test_a_base_model_whose_name_is_no_line_of_text(field: str, value: Any) -> None:
    with pytest.raises(InvalidPlanError, match=f"{field}=.*printable") as raised:
        BaseModelInfo(**{field: value})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["me/base", "C:\\My models\\é", "/模型\u3000/\xa0", 'a")', "", None])
def test_names_of_base_models(name: str | None) -> None:
    assert BaseModelInfo(name_or_path=name).name_or_path == name


# ----------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {}}, "at least one module"),
        ({"layers": {"a": (4, 8)}}, r"'a' is \(4, 8\); give LayerPlan"),
        ({"layers": {"a": LayerPlan(4, 8)}}, "the plan does not name"),
        ({"layers": {3: LayerPlan(4, 8)}, "shapes": None}, "3"),
        ({"initialization": "pissa"}, "initialization='pissa' must be"),
        ({"shapes": {"layers.1.q_proj": (32, 7)}}, r"rank 8 of 'layers.1.q_proj'.*\(32, 7\).*at most 7"),
    ],
)
def test_what_no_plan_can_hold(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPlanError, match=message):
        make_plan(**changes)


def test_a_plan_is_a_mapping() -> None:
    plan = make_plan()
    assert dict(plan) == LAYERS
    assert len(plan) == 3
    assert plan["layers.0.q_proj"].bits == 3
    assert "layers.9.q_proj" not in plan
    assert plan.get("layers.9.q_proj") is None


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(KeyError, match=r"layers\.0\.qproj.*Close names.*layers\.0\.q_proj"):
        make_plan()["layers.0.qproj"]


def test_asking_whether_a_name_is_in_the_plan_looks_for_no_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_, **__: pytest.fail("slow"))
    assert "layers.9.q_proj" not in make_plan()


def test_changing_the_mapping_afterwards_changes_nothing() -> None:
    layers, shapes = dict(LAYERS), dict(SHAPES)
    plan = BitRankPlan(layers, shapes=shapes)
    digest = plan.digest
    layers["layers.0.q_proj"] = LayerPlan(8, 1)
    shapes["layers.0.q_proj"] = (1, 1)
    assert plan["layers.0.q_proj"] == LayerPlan(3, 4)
    assert plan.shapes["layers.0.q_proj"] == (32, 64)
    assert plan.digest == digest


def test_averages() -> None:
    plan = make_plan()
    assert plan.average_bits == (32 * 64 * 3 + 64 * 128 * 16 + 32 * 64 * 2) / (32 * 64 * 2 + 64 * 128)
    assert make_plan(shapes=None).average_bits == 7
    assert plan.average_rank == 4


def test_equality_is_by_what_is_built() -> None:
    plan = make_plan()
    assert plan == make_plan(provenance={}, memory=None, base_model=None)
    assert plan == make_plan(layers=dict(reversed(LAYERS.items())))
    assert plan == LAYERS
    assert plan != make_plan(initialization="zero")
    assert plan != make_plan(quantizer=QuantizerSettings(group_size=64))
    assert plan != make_plan(layers=LAYERS | {"layers.0.q_proj": LayerPlan(4, 4)})
    assert plan != "plan"


def test_equal_plans_have_equal_hashes_and_digests() -> None:
    plan, twin = make_plan(), make_plan(layers=dict(reversed(LAYERS.items())), provenance={})
    assert hash(plan) == hash(twin)
    assert plan.digest == twin.digest
    assert len({plan, twin}) == 1


def test_different_plans_have_different_digests() -> None:
    plans = [
        make_plan(),
        make_plan(initialization="zero"),
        make_plan(quantizer=QuantizerSettings(backend="bitsandbytes", group_size=32)),
        make_plan(layers=LAYERS | {"layers.0.q_proj": LayerPlan(4, 4)}),
        make_plan(layers=LAYERS | {"layers.0.q_proj": LayerPlan(3, 8)}),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_the_digest_is_the_same_in_every_process_and_release() -> None:
    """Trial logs of earlier runs are found by it."""
    assert make_plan().digest == "ae21eff7fc0807852e8ab01ce505305b"


def test_a_deep_copy_is_the_plan_itself() -> None:
    plan = make_plan()
    assert copy.deepcopy(plan) is plan
    assert copy.deepcopy({"plan": plan})["plan"] is plan


def test_replace_changes_only_what_it_is_given() -> None:
    plan = make_plan(calibration=make_calibration())
    changed = plan.replace(initialization="zero")
    assert changed.initialization == "zero"
    assert_same_content(changed.replace(initialization="compensate"), plan)
    assert changed.calibration is plan.calibration
    assert plan.initialization == "compensate"


def test_repr_is_one_line() -> None:
    assert repr(make_plan()).startswith("BitRankPlan(3 modules, average_bits=")


# ----------------------------------------------------------------------------------------------------------- the file

layer_plans = st.builds(LayerPlan, st.sampled_from(SUPPORTED_BITS), st.integers(0, 64))
children = st.text(st.characters(categories=("L", "N"), include_characters="_- <>:"), min_size=1, max_size=6)
module_names = st.lists(children, min_size=1, max_size=3).map(".".join)
plans = st.builds(
    BitRankPlan,
    st.dictionaries(module_names, layer_plans, min_size=1, max_size=6),
    quantizer=st.builds(QuantizerSettings, group_size=st.sampled_from((8, 64, 1024))),
    initialization=st.sampled_from(("compensate", "zero")),
    provenance=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3),
)


@settings(max_examples=30, deadline=None)
@given(plan=plans)
def test_metadata_round_trip_of_any_plan(plan: BitRankPlan) -> None:
    metadata = plan.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert_same_content(BitRankPlan.from_metadata(metadata, "here"), plan)


def test_save_and_load(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save_pretrained(tmp_path / "new" / "folder")
    assert_same_content(BitRankPlan.from_pretrained(tmp_path / "new" / "folder"), plan)
    assert BitRankPlan.from_pretrained(str(tmp_path / "new" / "folder")).calibration is None


def test_save_and_load_of_numpy_values(tmp_path: Path) -> None:
    layers = {"a": LayerPlan(np.int64(4), np.int64(8))}  # type: ignore[arg-type]
    plan = BitRankPlan(layers, shapes={"a": (np.int64(32), np.int64(64))})  # type: ignore[dict-item]
    plan.save_pretrained(tmp_path)
    assert_same_content(BitRankPlan.from_pretrained(tmp_path), plan)


def test_save_and_load_with_calibration(tmp_path: Path) -> None:
    calibration = make_calibration()
    make_plan(calibration=calibration).save_pretrained(tmp_path)
    loaded = BitRankPlan.from_pretrained(tmp_path).calibration
    assert loaded is not None
    assert_same_calibration(loaded, calibration)


def test_the_file_can_be_read_without_this_package(tmp_path: Path) -> None:
    make_plan().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / PLAN_FILE)
    assert tensors["bits"].tolist() == [3, 16, 2]
    assert tensors["rank"].tolist() == [4, 0, 8]
    with safe_open(tmp_path / PLAN_FILE, framework="np") as file:
        assert json.loads(file.metadata()["autoqra_plan"])["modules"] == list(LAYERS)


def test_saving_beside_a_model_leaves_its_files_alone(tmp_path: Path) -> None:
    files = {"config.json": '{"model_type": "llama"}', "README.md": "# My model", "model.safetensors": "weights"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    make_plan().save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_saving_waits_for_no_pipe_and_writes_through_no_link(tmp_path: Path) -> None:
    folders = [tmp_path / "pipe", tmp_path / "link"]
    for folder in folders:
        folder.mkdir()
    os.mkfifo(folders[0] / "README.md")
    (folders[1] / "README.md").symlink_to(tmp_path / "elsewhere")
    for folder in folders:
        make_plan().save_pretrained(folder)
        assert BitRankPlan.from_pretrained(folder) == make_plan()
    assert not (tmp_path / "elsewhere").exists()


def test_saving_again_replaces_the_plan_and_ignores_the_old_calibration(tmp_path: Path) -> None:
    make_plan(calibration=make_calibration()).save_pretrained(tmp_path)
    other = make_plan(layers={"layers.0.q_proj": LayerPlan(8, 1)}, shapes=None)
    other.save_pretrained(tmp_path)
    loaded = BitRankPlan.from_pretrained(tmp_path)
    assert_same_content(loaded, other)
    assert loaded.calibration is None


def test_a_model_card_says_what_it_is(tmp_path: Path) -> None:
    make_plan().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "autoqra" in card
    assert "peft" in card


# -------------------------------------------------------------------------------------------------------- bad files


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(InvalidPlanError, match=rf"no {PLAN_FILE} in"):
        BitRankPlan.from_pretrained(tmp_path)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidPlanError, match="missing-plan"):
        BitRankPlan.from_pretrained(tmp_path / "missing-plan")


def test_a_safetensors_file_without_a_plan(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3)}, tmp_path / PLAN_FILE)
    with pytest.raises(InvalidPlanError, match="holds no AutoQRA plan"):
        BitRankPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", ["2", "999", "", "one", "-1", "1.5", "²"])
def test_another_format_version(version: str) -> None:
    metadata = make_plan().to_metadata() | {"autoqra_format_version": version}
    with pytest.raises(InvalidPlanError, match=r"plan format .* reads up to 1: upgrade with `pip"):
        BitRankPlan.from_metadata(metadata, "here")


def changed_content(**changes: Any) -> dict[str, str]:
    content = json.loads(make_plan().to_metadata()["autoqra_plan"]) | changes
    return sealed(json.dumps({key: value for key, value in content.items() if value != "delete"}))


def sealed(text: str) -> dict[str, str]:
    """A header whose checksum is right whatever the content is, as a program with a bug would write it."""
    metadata = make_plan().to_metadata() | {"autoqra_plan": text}
    return metadata | {"autoqra_checksum": checksum(metadata)}


@pytest.mark.parametrize(
    "changes",
    [
        {"modules": "delete"},
        {"bits": [4]},
        {"bits": [4, 4, 5]},
        {"rank": [0, 0, -1]},
        {"rank": [0, 0, 0.5]},
        {"modules": ["same", "same", "other"]},
        {"modules": 3},
        {"modules": [1, 2, 3]},
        {"shapes": {"layers.0.q_proj": [1]}},
        {"shapes": {"layers.0.q_proj": "ab"}},
        {"shapes": []},
        {"shapes": {"layers.0.q_proj": [-32, 64]}},
        {"quantizer": {"backend": "native", "group_size": "large"}},
        {"quantizer": {"backend": "native", "group_size": 64, "unknown": 1}},
        {"quantizer": None},
        {"base_model": {"nickname": "base"}},
        {"base_model": {"name_or_path": "a\nb"}},
        {"memory": {"weight_bytes": 1}},
        {"memory": [1, 2]},
        {"provenance": 3},
        {"initialization": None},
    ],
)
def test_content_that_does_not_fit_together(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlanError):
        BitRankPlan.from_metadata(changed_content(**changes), "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"'])
def test_content_that_is_no_object(text: str) -> None:
    metadata = sealed(text)
    with pytest.raises(InvalidPlanError, match="here is damaged"):
        BitRankPlan.from_metadata(metadata, "here")


def test_tensors_and_header_that_disagree(tmp_path: Path) -> None:
    plan = make_plan()
    tensors = {"bits": np.array([4, 16, 2], np.int32), "rank": np.array([4, 0, 8], np.int32)}
    save_file(tensors, tmp_path / PLAN_FILE, metadata=plan.to_metadata())
    with pytest.raises(InvalidPlanError, match="disagree"):
        BitRankPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [(), ("bits",), ("rank",)])
def test_missing_tensors(tmp_path: Path, kept: tuple[str, ...]) -> None:
    tensors = {"bits": np.array([3, 16, 2], np.int32), "rank": np.array([4, 0, 8], np.int32)}
    save_file({name: tensors[name] for name in kept}, tmp_path / PLAN_FILE, metadata=make_plan().to_metadata())
    with pytest.raises(InvalidPlanError):
        BitRankPlan.from_pretrained(tmp_path)


def test_no_flipped_bit_gives_another_plan_or_a_foreign_error(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save_pretrained(tmp_path)
    content = (tmp_path / PLAN_FILE).read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / PLAN_FILE).write_bytes(damaged)
        try:
            loaded = BitRankPlan.from_pretrained(tmp_path)
        except InvalidPlanError:
            noticed += 1
        else:
            assert_same_content(loaded, plan)
    assert noticed > 0.9 * len(content)


def test_a_missing_calibration_file(tmp_path: Path) -> None:
    make_plan(calibration=make_calibration()).save_pretrained(tmp_path)
    (tmp_path / CALIBRATION_FILE).unlink()
    with pytest.raises(InvalidPlanError, match=rf"{CALIBRATION_FILE} is missing"):
        BitRankPlan.from_pretrained(tmp_path)


def test_the_calibration_of_another_plan(tmp_path: Path) -> None:
    calibration = make_calibration()
    other = PlanCalibration(input_second_moments={"layers.0.q_proj": np.ones(64, np.float32)})
    for theirs in (other, PlanCalibration(input_second_moments=calibration.input_second_moments)):
        make_plan(calibration=calibration).save_pretrained(tmp_path)
        theirs.save(tmp_path)
        with pytest.raises(PlanMismatchError, match=rf"{CALIBRATION_FILE} belongs to another plan or adapter.*copy"):
            BitRankPlan.from_pretrained(tmp_path)


def test_a_damaged_calibration_file(tmp_path: Path) -> None:
    make_plan(calibration=make_calibration()).save_pretrained(tmp_path)
    content = (tmp_path / CALIBRATION_FILE).read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / CALIBRATION_FILE).write_bytes(content[:length])
        with pytest.raises(InvalidPlanError, match="damaged"):
            BitRankPlan.from_pretrained(tmp_path)


def test_no_flipped_bit_gives_another_calibration(tmp_path: Path) -> None:
    calibration = make_calibration()
    calibration.save(tmp_path)
    path = tmp_path / CALIBRATION_FILE
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            loaded = PlanCalibration.load(path)
        except InvalidPlanError:
            noticed += 1
        else:
            assert_same_calibration(loaded, calibration)
    assert noticed > 0.9 * len(content) / 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": np.zeros(3)}, "unknown tensor 'weight'"),
        ({"input_second_moment:": np.zeros(3)}, "unknown tensor"),
        ({"correction_left:a": np.zeros((3, 2), np.float16)}, "parts of some"),
    ],
)
def test_a_calibration_file_with_other_content(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    save_file(tensors, tmp_path / CALIBRATION_FILE)
    with pytest.raises(InvalidPlanError, match=message):
        PlanCalibration.load(tmp_path / CALIBRATION_FILE)
