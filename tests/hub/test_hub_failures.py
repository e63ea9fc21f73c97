"""Whatever fails on the way to the hub or back, the error says what, and nothing half-done stays behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig, BitRankPlan, LayerPlan
from peft_autoqra.errors import HubError, InvalidPlanError
from peft_autoqra.export.gguf_recipe import export_gguf_recipe
from peft_autoqra.export.merged_model import export_dequantized_base, export_merged_model
from peft_autoqra.hub_errors import HubRequest, hub_errors
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE
from peft_autoqra.plan_file import PLAN_FILE
from tests.conftest import TinyLlamaFactory
from tests.hub.conftest import ME, OTHER, Hub
from tests.tuner.synthetic import calibrated_plan, logits, randomize_adapters

PLAN = BitRankPlan({f"model.layers.{index}.mlp.down_proj": LayerPlan(3, 4) for index in range(2)})
LARGE_FILE = "[0-9a-f]{64}$"


@pytest.fixture
def shared(hub: Hub) -> Hub:
    """A hub with the plan ``me/plan``, and no one logged in."""
    PLAN.push_to_hub("me/plan")
    hub.log_in(None)
    return hub


def nothing_half_written(cache: Path) -> bool:
    files = [path for path in cache.rglob("*") if path.is_file()]
    whole = not any("incomplete" in path.name or path.suffix == ".tmp" for path in files)
    return whole and all(path.exists() for path in cache.rglob("snapshots/*/*"))  # links, to whole files


# --------------------------------------------------------------------------------------------------------- the answers
def gate(hub: Hub) -> None:
    hub.server.repository("me/plan").gated = True


def forbid(hub: Hub) -> None:
    hub.server.fail("HEAD", status=403, message="Blocked by a policy")


def break_down(hub: Hub) -> None:
    hub.server.fail("HEAD", status=500, message="Internal error")


def limit(hub: Hub) -> None:
    hub.server.fail("HEAD", status=429, message="Too many requests")


def disconnect(hub: Hub) -> None:
    hub.server.close()


def stall(hub: Hub) -> None:
    hub.server.fail("HEAD|GET", "stall")
    hub.time_out_after(0.05)


def switch_off(hub: Hub) -> None:
    hub.go_offline()


def nothing(hub: Hub) -> None:
    pass


READS: list[tuple[Callable[[Hub], None], str, dict, tuple[str, ...]]] = [
    (nothing, "out/plan", {}, ("neither a folder here", "shows without a token", "spelling", "hf auth login")),
    (nothing, "out/plan", {"token": ME}, ("shows with this token", "use a token that has access")),
    (nothing, "me/plan", {"token": "hf_expired"}, ("refuses reading", "401: Invalid credentials", "use a token")),
    (nothing, "me/plan", {"token": True}, ("no token for reading", "hf auth login")),
    (nothing, "me/plan", {"revision": "v9"}, ("no revision 'v9'", "branches or tags")),
    (nothing, "me/plan", {"local_files_only": True}, ("not in the cache", "local_files_only=False")),
    (nothing, "me/plan", {"local_files_only": True, "revision": "v1"}, ("at revision 'v1' is not in the cache",)),
    (gate, "me/plan", {}, ("gated", "ask for access")),
    (forbid, "me/plan", {}, ("refuses reading", "403: Blocked by a policy")),
    (break_down, "me/plan", {}, ("The hub failed", "500: Internal error", "try again")),
    (limit, "me/plan", {}, ("The hub failed", "429: Too many requests", "try again")),
    (disconnect, "me/plan", {}, ("connection to the hub failed", "Connection refused", "try again")),
    (stall, "me/plan", {}, ("connection to the hub failed", "timed out", "try again")),
    (switch_off, "me/plan", {}, ("not in the cache", "HF_HUB_OFFLINE unset")),
]


@pytest.mark.parametrize(("happen", "name", "settings", "words"), READS)
def test_reading_says_what_is_wrong(shared: Hub, happen, name, settings, words) -> None:
    happen(shared)
    with pytest.raises(HubError) as raised:
        BitRankPlan.from_pretrained(name, **settings)
    message = str(raised.value)
    for word in (repr(name), *words):
        assert word in message
    assert "\n" not in message
    assert raised.value.__cause__ is not None
    assert isinstance(raised.value, OSError)
    assert nothing_half_written(shared.cache)


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "me/pl an", "-x", ""])
def test_what_no_repository_can_be_called(hub: Hub, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert Path(name).is_dir()  # the working directory
        return
    with pytest.raises(InvalidPlanError, match="no folder here, and no repository") as raised:
        BitRankPlan.from_pretrained(name)
    assert repr(name) in str(raised.value)
    assert not hub.server.requests()


def test_a_file_in_place_of_its_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAN.save_pretrained(tmp_path / "plan")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidPlanError, match=r"is a file; give the folder"):
        BitRankPlan.from_pretrained(f"plan/{PLAN_FILE}")
    assert not hub.server.requests()


def test_a_repository_without_a_plan(hub: Hub) -> None:
    HfApi().create_repo("me/model")
    with pytest.raises(InvalidPlanError, match=f"no {PLAN_FILE} in 'me/model'"):
        BitRankPlan.from_pretrained("me/model")


def test_a_full_disk_is_not_the_hubs_fault(shared: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        shared.use_cache(Path("/proc/cache"))  # even root cannot make folders there
    else:
        shared.cache.chmod(0o500)
    with pytest.raises(OSError, match=str(shared.cache)) as raised:
        BitRankPlan.from_pretrained("me/plan")
    assert not isinstance(raised.value, HubError)


def test_configurations_pass_the_error_on(shared: Hub) -> None:
    for make in (AutoQRAConfig, AutoQRAQuantConfig):
        with pytest.raises(HubError, match="neither a folder here"):
            make(plan="out/plan")


# -------------------------------------------------------------------------------------------------- broken connections
def test_a_broken_download_leaves_nothing_behind(shared: Hub) -> None:
    fault = shared.server.fail(f"GET /{LARGE_FILE}", "cut")
    with pytest.raises(HubError, match=rf"failed while reading {PLAN_FILE} of 'me/plan' .*incomplete") as raised:
        BitRankPlan.from_pretrained("me/plan")
    assert "try again" in str(raised.value)
    assert nothing_half_written(shared.cache)
    assert not list(shared.cache.rglob(PLAN_FILE))
    assert fault.num_hits > 1
    shared.server.state.faults.clear()
    assert BitRankPlan.from_pretrained("me/plan") == PLAN


def test_a_download_that_never_comes(shared: Hub) -> None:
    shared.server.fail(f"GET /{LARGE_FILE}", "stall")
    shared.time_out_after(0.05)
    with pytest.raises(HubError, match=rf"failed while reading {PLAN_FILE} of 'me/plan' .*timed out"):
        BitRankPlan.from_pretrained("me/plan")
    assert nothing_half_written(shared.cache)


def test_a_failure_that_passes_is_not_noticed(shared: Hub) -> None:
    faults = [
        shared.server.fail(f"GET /{LARGE_FILE}", "cut", times=1),
        shared.server.fail("HEAD", status=503, times=1),
    ]
    assert BitRankPlan.from_pretrained("me/plan") == PLAN
    assert [fault.num_hits for fault in faults] == [1, 1]


def test_an_adapter_whose_calibration_breaks_off(hub: Hub, tiny_llama: TinyLlamaFactory) -> None:
    """PEFT reads the rest; the calibration is ours."""
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=calibrated_plan(tiny_llama()), task_type="CAUSAL_LM"))
    randomize_adapters(model)
    model.push_to_hub("me/adapter")
    oid = hub.server.repository("me/adapter").find("main").files[ADAPTER_CALIBRATION_FILE].oid
    fault = hub.server.fail(f"GET /{oid}", "cut")
    base = tiny_llama()
    before = logits(base)
    with pytest.raises(HubError, match=f"failed while reading {ADAPTER_CALIBRATION_FILE} of 'me/adapter'"):
        PeftModel.from_pretrained(base, "me/adapter")
    assert torch.equal(logits(base), before)
    assert nothing_half_written(hub.cache)
    fault.times = 0
    assert torch.equal(logits(PeftModel.from_pretrained(base, "me/adapter")), logits(model))
    assert PeftConfig.from_pretrained("me/adapter").calibration is not None


def test_a_quantized_base_that_breaks_off_loads_whole_the_next_time(hub: Hub, tiny_llama: TinyLlamaFactory) -> None:
    tiny_llama().push_to_hub("me/base")
    config = AutoQRAQuantConfig(bits=3)
    quantized = AutoModelForCausalLM.from_pretrained("me/base", quantization_config=config)
    quantized.push_to_hub("me/quantized")
    fault = hub.server.fail(f"GET /{LARGE_FILE}", "cut")
    with pytest.raises(OSError, match="me/quantized"):  # of transformers
        AutoModelForCausalLM.from_pretrained("me/quantized")
    assert nothing_half_written(hub.cache)
    fault.times = 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/quantized")), logits(quantized))


# -------------------------------------------------------------------------------------------------------------- pushes
def break_upload(hub: Hub) -> None:
    hub.server.fail("PUT", "cut")


def stall_upload(hub: Hub) -> None:
    hub.server.fail("PUT", "stall")
    hub.time_out_after(0.05)


def refuse_upload(hub: Hub) -> None:
    hub.server.fail("PUT", status=403, message="Signature expired")


def break_commit(hub: Hub) -> None:
    hub.server.fail("POST .*/commit/", status=503)


def break_create(hub: Hub) -> None:
    hub.server.fail("POST .*/create", status=502, message="Bad gateway")


PUSHES: list[tuple[Callable[[Hub], None], str, dict, tuple[str, ...]]] = [
    (nothing, "me/plan", {"token": False}, ("refuses pushing", "401", "hf auth login", "write access")),
    (nothing, "me/plan", {"token": "hf_expired"}, ("401: Invalid credentials", "use a token that has write access")),
    (nothing, "other/new", {}, ("403", 'namespace "other"', "use a token that has write access")),
    (nothing, "other/public", {}, ("403", "you don't have write access", "use a token")),
    (nothing, "other/private", {}, ("403", 'namespace "other"', "use a token")),
    (nothing, "me/a plan", {}, ("no repository name", "'owner/name'")),
    (disconnect, "me/plan", {}, ("connection to the hub failed while pushing", "not committed", "push again")),
    (switch_off, "me/plan", {}, ("Offline mode is on", "unset HF_HUB_OFFLINE")),
    (break_create, "me/plan", {}, ("The hub failed while pushing", "502: Bad gateway", "push again")),
    (break_upload, "me/plan", {}, ("connection to the hub failed while pushing", "not committed", "push again")),
    (stall_upload, "me/plan", {}, ("connection to the hub failed while pushing", "timed out", "push again")),
    (refuse_upload, "me/plan", {}, ("refuses pushing", "403: Signature expired")),
    (break_commit, "me/plan", {}, ("The hub failed while pushing", "503: Service unavailable", "push again")),
]


@pytest.mark.parametrize(("happen", "name", "settings", "words"), PUSHES)
def test_pushing_says_what_is_wrong(hub: Hub, happen, name, settings, words) -> None:
    for kind in ("public", "private"):
        HfApi(token=OTHER).create_repo(f"other/{kind}", private=kind == "private")
    happen(hub)
    with pytest.raises(HubError) as raised:
        PLAN.push_to_hub(name, **settings)
    message = str(raised.value)
    for word in (repr(name), *words):
        assert word in message
    assert "\n" not in message
    assert all(repository.files() == {} for repository in hub.server.state.repositories.values())


def test_an_upload_whose_thread_lost_its_connection() -> None:
    """What the client raises where another thread's failed upload has closed the session that they share."""
    with (
        pytest.raises(HubError, match=r"connection to the hub failed while pushing to 'me/plan'.* push again"),
        hub_errors(HubRequest(repo_id="me/plan", action="push")),
    ):
        raise RuntimeError("Error while uploading 'a.png' to the Hub.") from AttributeError("no attribute 'request'")
    with pytest.raises(RuntimeError, match="another"), hub_errors(HubRequest(repo_id="me/plan", action="push")):
        raise RuntimeError("another defect")


@pytest.mark.parametrize("happen", [break_upload, break_commit])
def test_an_interrupted_push_can_be_repeated(hub: Hub, happen: Callable[[Hub], None]) -> None:
    PLAN.push_to_hub("me/plan")
    better = BitRankPlan(dict.fromkeys(PLAN, LayerPlan(4, 4)))
    happen(hub)
    with pytest.raises(HubError):
        better.push_to_hub("me/plan")
    assert BitRankPlan.from_pretrained("me/plan") == PLAN
    hub.server.state.faults.clear()
    better.push_to_hub("me/plan")
    assert BitRankPlan.from_pretrained("me/plan") == better


# ------------------------------------------------------------------------------------------------------------- exports
@pytest.mark.parametrize("export", [export_merged_model, export_dequantized_base, export_gguf_recipe])
@pytest.mark.parametrize(("change", "words"), [(nothing, "shows without a token"), (gate, "gated"), (limit, "429")])
def test_exports_of_what_cannot_be_read(shared: Hub, export, change, words: str, tmp_path: Path) -> None:
    repo_id = "me/none" if change is nothing else "me/plan"
    change(shared)
    with pytest.raises(HubError, match=words):
        export(repo_id, tmp_path / "out")
    assert not (tmp_path / "out").exists()
