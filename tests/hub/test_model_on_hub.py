"""Adapters and quantized bases pushed and loaded with the real client: the same logits to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig, BitRankPlan
from peft_autoqra.errors import HubError
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE
from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.plan_picture import PICTURE_FILE
from tests.conftest import TinyLlamaFactory
from tests.hub.conftest import ME, Hub
from tests.streaming.bases import assert_same_codes
from tests.tuner.synthetic import calibrated_plan, logits, mixed_plan, randomize_adapters


@pytest.fixture
def base(hub: Hub, tiny_llama: TinyLlamaFactory) -> str:
    """The 16-bit base in a repository of its own."""
    tiny_llama().push_to_hub("me/base")
    return "me/base"


@pytest.fixture(params=["plain", "calibrated"])
def adapted(base: str, request: pytest.FixtureRequest) -> PeftModel:
    """A model with a trained adapter; calibrated ones have a file more."""
    dense = AutoModelForCausalLM.from_pretrained(base)
    plan = calibrated_plan(dense) if request.param == "calibrated" else mixed_plan(dense)
    return adapt(dense, plan=plan)


def adapt(model: nn.Module, **settings: Any) -> PeftModel:
    adapted = get_peft_model(model, AutoQRAConfig(**settings, task_type="CAUSAL_LM"))
    randomize_adapters(adapted)
    return adapted


def dense_base(**kwargs: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained("me/base", **kwargs)


def transformers_adapter(repo_id: str, **kwargs: Any) -> nn.Module:
    model = dense_base()
    model.load_adapter(repo_id, adapter_kwargs=kwargs)
    return model


WAYS = {
    "PeftModel": lambda repo_id, **kwargs: PeftModel.from_pretrained(dense_base(), repo_id, **kwargs),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained,
    "load_adapter": transformers_adapter,
}


# ------------------------------------------------------------------------------------------------------------ adapters
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_comes_back(hub: Hub, adapted: PeftModel, way: str) -> None:
    adapted.push_to_hub("me/adapter")
    files = hub.server.repository("me/adapter").files()
    assert (ADAPTER_CALIBRATION_FILE in files) == (adapted.peft_config["default"].calibration is not None)
    again = WAYS[way]("me/adapter")
    assert torch.equal(logits(again), logits(adapted))


def test_the_card_of_a_pushed_adapter_is_ours_and_kept_up(hub: Hub, adapted: PeftModel) -> None:
    """transformers writes its own, or takes the one that is there."""
    for _ in range(2):
        adapted.push_to_hub("me/adapter")
        files = hub.server.repository("me/adapter").files()
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "peft"
        assert "autoqra" in card.data.tags
        assert card.text.count("import peft_autoqra") == 1
        assert files[PICTURE_FILE].startswith(b"\x89PNG")


def test_the_card_of_a_pushed_base_is_ours(hub: Hub, base: str) -> None:
    dense_base(quantization_config=AutoQRAQuantConfig(bits=3)).push_to_hub("me/quantized")
    files = hub.server.repository("me/quantized").files()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("transformers", "me/base")
    assert "import peft_autoqra" in card.text
    assert files[PICTURE_FILE].startswith(b"\x89PNG")


def test_the_card_of_another_model_is_none_of_ours(hub: Hub, base: str) -> None:
    dense_base().push_to_hub("me/other")
    files = hub.server.repository("me/other").files()
    assert b"autoqra" not in files["README.md"]
    assert PICTURE_FILE not in files


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_at_a_revision(hub: Hub, adapted: PeftModel, way: str) -> None:
    adapted.push_to_hub("me/adapter", revision="dev", commit_message="First", private=True)
    repository = hub.server.repository("me/adapter")
    commit = repository.find("dev")
    assert (repository.private, commit.message, repository.files("main")) == (True, "First", {})
    HfApi().create_tag("me/adapter", tag="v1", revision="dev")
    first = logits(adapted)
    randomize_adapters(adapted, seed=1)
    adapted.push_to_hub("me/adapter", revision="dev")
    assert not torch.equal(logits(adapted), first)
    for revision, expected in {"dev": logits(adapted), "v1": first, commit.sha: first}.items():
        assert torch.equal(logits(WAYS[way]("me/adapter", revision=revision)), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_private_adapter_with_a_token(hub: Hub, adapted: PeftModel, way: str, tmp_path: Path) -> None:
    adapted.push_to_hub("me/adapter", private=True)
    hub.log_in(None)
    again = WAYS[way]("me/adapter", token=ME, cache_dir=tmp_path / "mine")
    assert torch.equal(logits(again), logits(adapted))
    assert list((tmp_path / "mine").rglob(ADAPTER_FILE))
    assert not list(hub.cache.rglob(ADAPTER_FILE))


def test_a_pull_request_with_an_adapter(hub: Hub, adapted: PeftModel) -> None:
    HfApi().create_repo("me/adapter")
    info = adapted.push_to_hub("me/adapter", create_pr=True)
    assert hub.server.repository("me/adapter").files() == {}
    again = WAYS["PeftModel"]("me/adapter", revision=info.pr_revision)
    assert torch.equal(logits(again), logits(adapted))


def test_an_adapter_in_a_subfolder(hub: Hub, adapted: PeftModel, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path / "adapter")
    HfApi().create_repo("me/adapters")
    HfApi().upload_folder(repo_id="me/adapters", folder_path=tmp_path / "adapter", path_in_repo="first")
    assert PeftConfig.from_pretrained("me/adapters", subfolder="first").peft_type == "LORA"
    again = PeftModel.from_pretrained(dense_base(), "me/adapters", subfolder="first")
    assert torch.equal(logits(again), logits(adapted))
    again = transformers_adapter("me/adapters", subfolder="first")
    assert torch.equal(logits(again), logits(adapted))


def test_a_damaged_download_is_replaced_when_forced(hub: Hub, adapted: PeftModel) -> None:
    adapted.push_to_hub("me/adapter")
    WAYS["PeftModel"]("me/adapter")
    for name in (ADAPTER_FILE, ADAPTER_CALIBRATION_FILE):
        for cached in hub.cache.rglob(name):
            cached.resolve().write_bytes(b"damaged")
    again = PeftModel.from_pretrained(dense_base(), "me/adapter", force_download=True)
    assert torch.equal(logits(again), logits(adapted))


# ----------------------------------------------------------------------------------------------------- quantized bases
QUANTIZED = {
    "bits": lambda model: AutoQRAQuantConfig(bits=3),
    "calibrated": lambda model: AutoQRAQuantConfig(plan=calibrated_plan(model)),
}


@pytest.mark.parametrize("make_config", QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantized_base_comes_back(hub: Hub, base: str, make_config: Any) -> None:
    quantized = dense_base(quantization_config=make_config(dense_base()))
    quantized.push_to_hub("me/quantized", private=True, revision="dev", commit_message="Three bits")
    commit = hub.server.repository("me/quantized").find("dev")
    assert commit.message == "Three bits"
    for revision in ("dev", commit.sha):
        again = AutoModelForCausalLM.from_pretrained("me/quantized", revision=revision, token=ME)
        assert_same_codes(quantized, again)
        assert torch.equal(logits(again), logits(quantized))


@pytest.mark.parametrize("way", ["AutoPeftModel", "PeftModel"])
def test_an_adapter_on_a_quantized_base_downloads_no_dense_weights(hub: Hub, base: str, way: str) -> None:
    dense_base(quantization_config=AutoQRAQuantConfig(bits=3)).push_to_hub("me/quantized")
    model = adapt(AutoModelForCausalLM.from_pretrained("me/quantized"), bits=3, r=4)
    assert model.peft_config["default"].base_model_name_or_path == "me/quantized"
    model.push_to_hub("me/adapter")
    shutil.rmtree(hub.cache)
    del hub.server.state.repositories["me/base"], hub.server.state.requests[:]
    if way == "AutoPeftModel":
        again = AutoPeftModelForCausalLM.from_pretrained("me/adapter")
    else:
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/quantized"), "me/adapter")
    assert torch.equal(logits(again), logits(model))
    assert not hub.server.requests("me/base")
    assert hub.server.requests("me/quantized/resolve/[^/]+/model.safetensors")


def test_an_adapter_as_the_plan_of_its_streamed_base(hub: Hub, adapted: PeftModel) -> None:
    adapted.push_to_hub("me/adapter")
    config = AutoQRAQuantConfig(plan="me/adapter")
    again = AutoPeftModelForCausalLM.from_pretrained("me/adapter", quantization_config=config)
    assert torch.equal(logits(again), logits(adapted))


# ------------------------------------------------------------------------------------------------------------- offline
@pytest.mark.parametrize(
    ("way", "offline"),
    [  # PEFT asks the hub which file of weights there is, even with local_files_only
        *((way, "HF_HUB_OFFLINE") for way in WAYS),
        *(("load_adapter", offline) for offline in ("local_files_only", "server gone")),
    ],
)
def test_what_was_loaded_once_loads_without_the_hub(hub: Hub, adapted: PeftModel, way: str, offline: str) -> None:
    adapted.push_to_hub("me/adapter")
    WAYS[way]("me/adapter")
    if offline == "HF_HUB_OFFLINE":
        hub.go_offline()
    else:
        hub.server.close()
    settings = {"local_files_only": True} if offline == "local_files_only" else {}
    assert torch.equal(logits(WAYS[way]("me/adapter", **settings)), logits(adapted))


def test_a_quantized_base_and_plans_load_without_the_hub(hub: Hub, adapted: PeftModel) -> None:
    plan = adapted.peft_config["default"].plan
    plan.push_to_hub("me/plan")
    adapted.push_to_hub("me/adapter")
    quantized = dense_base(quantization_config=AutoQRAQuantConfig(plan="me/plan"))
    quantized.push_to_hub("me/quantized")
    AutoModelForCausalLM.from_pretrained("me/quantized")
    BitRankPlan.from_pretrained("me/adapter")
    hub.server.close()
    for name in ("me/plan", "me/adapter"):  # the latter has no file of plans, which the cache knows
        assert dict(BitRankPlan.from_pretrained(name, local_files_only=True)) == dict(plan)
    hub.go_offline()
    for name in ("me/plan", "me/adapter"):
        assert AutoQRAConfig(plan=name).plan.digest == BitRankPlan.from_pretrained(name).digest
    again = AutoModelForCausalLM.from_pretrained("me/quantized")
    assert torch.equal(logits(again), logits(quantized))
    again = dense_base(quantization_config=AutoQRAQuantConfig(plan="me/adapter"), local_files_only=True)
    assert_same_codes(again, quantized)


def test_without_a_copy_in_the_cache_the_error_names_the_repository(hub: Hub, adapted: PeftModel) -> None:
    adapted.push_to_hub("me/adapter")
    PeftConfig.from_pretrained("me/adapter")
    hub.go_offline()
    if adapted.peft_config["default"].calibration is not None:
        (cached,) = hub.cache.rglob(ADAPTER_CALIBRATION_FILE)
        cached.unlink()
        with pytest.raises(HubError, match=f"{ADAPTER_CALIBRATION_FILE} of 'me/adapter' is not in the cache"):
            PeftConfig.from_pretrained("me/adapter")
    with pytest.raises(ValueError, match="me/other"):  # of PEFT
        PeftConfig.from_pretrained("me/other")
    with pytest.raises(OSError, match=r"me/quantized|couldn't connect"):  # of transformers
        AutoModelForCausalLM.from_pretrained("me/quantized")
