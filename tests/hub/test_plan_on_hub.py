"""Plans pushed and loaded with the real client."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi
from peft import get_peft_model

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig, BaseModelInfo, BitRankPlan, LayerPlan
from peft_autoqra.errors import HubError, InvalidPlanError
from peft_autoqra.plan_calibration import CALIBRATION_FILE
from peft_autoqra.plan_file import PLAN_FILE
from peft_autoqra.plan_picture import PICTURE_FILE
from tests.conftest import REPOSITORY, TinyLlamaFactory
from tests.hub.conftest import ME, OTHER, Hub
from tests.tuner.synthetic import calibrated_plan, mixed_plan

NAMES = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]


def make_plan(bits: int = 3) -> BitRankPlan:
    return BitRankPlan(dict.fromkeys(NAMES, LayerPlan(bits, 4)), base_model=BaseModelInfo(name_or_path="me/base"))


def test_a_calibrated_plan_comes_back_whole(hub: Hub, tiny_llama: TinyLlamaFactory) -> None:
    plan = calibrated_plan(tiny_llama())
    url = plan.push_to_hub("my-plan")
    commit = hub.server.repository("me/my-plan").find("main")
    assert url == f"https://huggingface.co/me/my-plan/commit/{commit.sha}"
    assert commit.message == "Upload plan"
    assert set(hub.server.repository("me/my-plan").files()) == {PLAN_FILE, CALIBRATION_FILE, PICTURE_FILE, "README.md"}
    loaded = BitRankPlan.from_pretrained("me/my-plan")
    assert loaded == plan
    assert loaded.shapes == plan.shapes
    assert loaded.base_model == plan.base_model
    assert loaded.calibration.digest == plan.calibration.digest
    for name, moment in plan.calibration.input_second_moments.items():
        assert np.array_equal(loaded.calibration.input_second_moments[name], moment)


def test_configurations_take_the_name_of_a_repository(hub: Hub, tiny_llama: TinyLlamaFactory) -> None:
    plan = mixed_plan(tiny_llama())
    plan.push_to_hub("me/plan")
    assert AutoQRAConfig(plan="me/plan").plan == plan
    assert AutoQRAQuantConfig(plan="me/plan").plan == plan
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan="me/plan", task_type="CAUSAL_LM"))
    model.save_pretrained(hub.cache.parent / "adapter")
    model.push_to_hub("me/adapter")
    assert dict(BitRankPlan.from_pretrained("me/adapter")) == dict(plan)


@pytest.mark.parametrize("argument", ["revision", "branch"])
def test_every_kind_of_revision(hub: Hub, argument: str) -> None:
    make_plan(2).push_to_hub("me/plan")
    first = hub.server.repository("me/plan").refs["main"]
    HfApi().create_tag("me/plan", tag="v1")
    make_plan(3).push_to_hub("me/plan", **{argument: "three"}, commit_message="Try 3 bits")
    make_plan(4).push_to_hub("me/plan", **{argument: "three"})
    make_plan(8).push_to_hub("me/plan")
    repository = hub.server.repository("me/plan")
    parent = repository.commits[repository.find("three").parent]
    assert (parent.message, parent.parent) == ("Try 3 bits", first)
    cases = {None: 8, "main": 8, "v1": 2, "three": 4, first: 2, parent.sha: 3}
    for revision, bits in cases.items():
        assert BitRankPlan.from_pretrained("me/plan", revision=revision) == make_plan(bits)


def test_a_pull_request(hub: Hub) -> None:
    make_plan(2).push_to_hub("me/plan")
    info = make_plan(4).push_to_hub("me/plan", create_pr=True, token=OTHER)
    assert info.pr_url == "https://huggingface.co/me/plan/discussions/1"
    assert BitRankPlan.from_pretrained("me/plan") == make_plan(2)
    assert BitRankPlan.from_pretrained("me/plan", revision="refs/pr/1") == make_plan(4)
    with pytest.raises(HubError, match="leave out revision='dev'"):
        make_plan(4).push_to_hub("me/plan", create_pr=True, revision="dev")
    assert "dev" not in hub.server.repository("me/plan").refs


def test_a_private_repository_takes_a_token(hub: Hub) -> None:
    hub.log_in(None)
    make_plan().push_to_hub("me/plan", private=True, token=ME)
    assert hub.server.repository("me/plan").private
    assert BitRankPlan.from_pretrained("me/plan", token=ME) == make_plan()
    hub.use_cache(hub.cache.with_name("other"))
    with pytest.raises(HubError, match=r"shows without a token.*hf auth login"):
        BitRankPlan.from_pretrained("me/plan")
    with pytest.raises(HubError, match=r"shows with this token.*use a token that has access"):
        BitRankPlan.from_pretrained("me/plan", token=OTHER)


def test_private_is_not_promised_for_a_public_repository(hub: Hub) -> None:
    make_plan(2).push_to_hub("me/plan")
    with pytest.raises(HubError, match="'me/plan' exists and is public"):
        make_plan(3).push_to_hub("me/plan", private=True)
    assert BitRankPlan.from_pretrained("me/plan") == make_plan(2)


def test_the_card_of_something_else_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    HfApi().create_repo("me/adapter")
    HfApi().upload_file(repo_id="me/adapter", path_or_fileobj=b"# Adapter\n", path_in_repo="README.md")
    make_plan().push_to_hub("me/adapter")
    files = hub.server.repository("me/adapter").files()
    assert files["README.md"] == b"# Adapter\n"
    assert PLAN_FILE in files
    make_plan(2).push_to_hub("me/plan")
    make_plan(8).push_to_hub("me/plan")
    assert b"at 8 bits" in hub.server.repository("me/plan").files()["README.md"]


def test_saving_may_push_too(hub: Hub, tmp_path: Path) -> None:
    url = make_plan().save_pretrained(tmp_path / "my-plan", push_to_hub=True, private=True, revision="dev")
    assert url.startswith("https://huggingface.co/me/my-plan/commit/")
    assert set(hub.server.repository("me/my-plan").files("dev")) == {PLAN_FILE, PICTURE_FILE, "README.md"}


def test_another_cache_and_a_new_download(hub: Hub, tmp_path: Path) -> None:
    make_plan().push_to_hub("me/plan")
    BitRankPlan.from_pretrained("me/plan", cache_dir=tmp_path / "mine")
    assert not list(hub.cache.rglob(PLAN_FILE))
    (cached,) = (tmp_path / "mine").rglob(PLAN_FILE)
    cached.resolve().write_bytes(b"damaged")
    with pytest.raises(InvalidPlanError, match="damaged"):
        BitRankPlan.from_pretrained("me/plan", cache_dir=tmp_path / "mine")
    assert BitRankPlan.from_pretrained("me/plan", cache_dir=tmp_path / "mine", force_download=True) == make_plan()


def test_the_example(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, tiny_llama) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    make_plan().save_pretrained(tmp_path / "plan")
    flags = {"plan": tmp_path / "plan", "copy_to": tmp_path / "copy", "model": tmp_path / "model", "repo_id": "plan"}
    monkeypatch.setattr(sys, "argv", ["04", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))])
    runpy.run_path(str(REPOSITORY / "examples" / "04_share_a_plan.py"), run_name="__main__")
    assert "pushed: https://huggingface.co/me/plan/commit/" in capsys.readouterr().out
    assert set(hub.server.repository("me/plan").files()) == {PLAN_FILE, PICTURE_FILE, "README.md"}
