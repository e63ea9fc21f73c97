"""The pictures of model cards, on disk and in what is pushed."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from peft_autoqra import card_pictures
from peft_autoqra.card_pictures import FRONT_FILE, MEMORY_FILE, write_card_pictures
from peft_autoqra.hub import prepare_folder
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.plan_picture import PICTURE_FILE, draw_plan
from peft_autoqra.plan_points import PlanPoint, points_from

ALL = {PICTURE_FILE, FRONT_FILE, MEMORY_FILE}
LAYERS = {f"model.layers.{i}.mlp.up_proj": LayerPlan(4, 4 * i) for i in range(4)}
POINTS = [
    PlanPoint(
        total_bytes=7_000_000 + 1000 * i,
        loss=3.0,
        difference=0.3 - i / 10,
        interval=(0.2 - i / 10, 0.4 - i / 10),
        num_seeds=2,
        stage="evolution" if i else "baseline",
        name=name,
    )
    for i, name in enumerate(("uniform", None, None, "winner"))
]
PLAN = BitRankPlan(
    LAYERS,
    memory=MemoryEstimate(
        weight_bytes=4_000_000,
        metadata_bytes=200_000,
        untouched_bytes=1_000_000,
        adapter_bytes=500_000,
        gradient_bytes=500_000,
        optimizer_bytes=1_000_000,
    ),
    provenance={
        "budget_bytes": 7_500_000,
        "budget_scope": "training",
        "points": [point.to_dict() for point in POINTS],
    },
)


def with_points(points: object) -> BitRankPlan:
    return PLAN.replace(provenance={**PLAN.provenance, "points": points})


def test_card_of_a_searched_plan_shows_plan_front_and_memory(tmp_path):
    PLAN.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for name in ALL:
        assert f"]({name})" in text
        image = Image.open(tmp_path / name).convert("RGB")
        assert len(image.getcolors(1 << 20)) > 20  # not blank
    minus = "\N{MINUS SIGN}"
    assert f"| winner | 7.0 MB | 0.0000 | {minus}0.1000 to +0.1000 |" in text
    assert "| evolution, on the front | 7.0 MB | +0.2000 |" in text
    assert set(prepare_folder(tmp_path).filenames) >= ALL


def test_points_come_back_as_they_were():
    unknown = PlanPoint(
        total_bytes=1, loss=2.0, difference=0.0, interval=(-float("inf"), float("inf")), num_seeds=1, stage="baseline"
    )
    assert points_from({"points": [point.to_dict() for point in (*POINTS, unknown)]}) == (*POINTS, unknown)


@pytest.mark.parametrize(
    "damage",
    [
        None,
        {},
        ["x"],
        [[]],
        [{}],
        [POINTS[0].to_dict() | {"loss": float("nan")}],
        [POINTS[0].to_dict() | {"loss": 10**400}],
        [POINTS[0].to_dict() | {"total_bytes": "7"}],
        [POINTS[0].to_dict() | {"interval": [0.0]}],
        [POINTS[0].to_dict() | {"interval": [0.0, None]}],
        [POINTS[0].to_dict() | {"interval": {"a": 1, "b": 2}}],
        [POINTS[0].to_dict() | {"interval": [5.0, 6.0]}],
        [POINTS[0].to_dict() | {"name": []}],
        [POINTS[0].to_dict() | {"name": "\x00"}],
        [POINTS[0].to_dict() | {"stage": "x" * 1000}],
        [POINTS[0].to_dict() | {"more": 1}],
        [POINTS[0].to_dict()] * 5000,
    ],
)
def test_records_of_strangers_draw_nothing(tmp_path, damage):
    assert points_from({"points": damage}) == ()
    with_points(damage).to_card()
    assert write_card_pictures(tmp_path, LAYERS, None, {"points": damage}) == {PICTURE_FILE}


@pytest.mark.parametrize(
    "budget", [(True, "training"), (10**30, "training"), (5, "other"), (-5, "stored"), (None, None)]
)
def test_a_budget_that_is_none_is_not_drawn(tmp_path, budget):
    record = {"budget_bytes": budget[0], "budget_scope": budget[1]}
    assert write_card_pictures(tmp_path, LAYERS, PLAN.memory, record) == {PICTURE_FILE, MEMORY_FILE}


def test_pictures_are_drawn_and_written_once(tmp_path, monkeypatch):
    assert write_card_pictures(tmp_path, LAYERS, PLAN.memory, PLAN.provenance) == ALL
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in ALL}
    monkeypatch.setattr("peft_autoqra.plan_picture.PlanGrid", None)  # drawing needs it
    monkeypatch.setattr(card_pictures, "front_figure", None)
    monkeypatch.setattr(card_pictures, "memory_figure", None)
    assert write_card_pictures(tmp_path, dict(LAYERS), PLAN.memory, PLAN.provenance) == ALL
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in ALL} == written
    other = tmp_path / "other"
    other.mkdir()
    assert write_card_pictures(other, LAYERS, PLAN.memory, PLAN.provenance) == ALL
    assert all((other / name).read_bytes() == (tmp_path / name).read_bytes() for name in ALL)


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / FRONT_FILE).mkdir()
    with pytest.warns(UserWarning, match=r"autoqra_front\.png, cannot be written"):
        assert write_card_pictures(tmp_path, LAYERS, PLAN.memory, PLAN.provenance) == ALL - {FRONT_FILE}
    assert not list(tmp_path.glob("*.partial"))


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    blob, path = tmp_path / "blob", tmp_path / PICTURE_FILE
    blob.write_bytes(b"shared")
    path.symlink_to(blob)
    assert write_card_pictures(tmp_path, LAYERS) == {PICTURE_FILE}
    assert blob.read_bytes() == b"shared"
    assert path.read_bytes() == draw_plan(LAYERS)
    Image.open(io.BytesIO(path.read_bytes())).verify()
