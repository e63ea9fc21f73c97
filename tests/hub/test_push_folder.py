"""What of a folder goes to the hub, from Python and by ``autoqra push``."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig, BaseModelInfo, BitRankPlan, LayerPlan, cli
from peft_autoqra.errors import HubError, InvalidPlanError
from peft_autoqra.hub import ADAPTER, PLAN, QUANTIZED_BASE, prepare_folder, push_folder
from peft_autoqra.hub_repository import PushTarget
from peft_autoqra.plan_calibration import ADAPTER_CALIBRATION_FILE, CALIBRATION_FILE
from peft_autoqra.plan_file import ADAPTER_FILE, PLAN_FILE
from peft_autoqra.plan_picture import PICTURE_FILE
from tests.commands.plans import documented_keys
from tests.conftest import TinyLlamaFactory
from tests.hostile_files import nested
from tests.hub.conftest import OTHER, Hub
from tests.test_cli import fails_with_one_line
from tests.tiny_data import word_tokenizer
from tests.tuner.synthetic import calibrated_plan, logits, randomize_adapters

CARD = {"README.md", PICTURE_FILE}
ADAPTER_FILES = {"adapter_config.json", ADAPTER_FILE, ADAPTER_CALIBRATION_FILE} | CARD
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
JUNK = (
    "checkpoint-2/adapter_model.safetensors", "checkpoint-2/optimizer.pt", "finetune_result.json", "optimizer.pt",
    "rng_state.pth", "runs/events", "scheduler.pt", "trainer_state.json", "training_args.bin", ".git/config",
    "notes.txt", "model-00001-of-00002.safetensors", "autoqra_other.safetensors",
)  # fmt: skip


def add_junk(folder: Path) -> Path:
    for name in JUNK:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"junk")
    return folder


@pytest.fixture
def plan(tiny_llama: TinyLlamaFactory) -> BitRankPlan:
    plan = calibrated_plan(tiny_llama())
    return plan.replace(base_model=BaseModelInfo(name_or_path="me/base", fingerprint=plan.base_model.fingerprint))


@pytest.fixture
def plan_folder(plan: BitRankPlan, tmp_path: Path) -> Path:
    plan.save_pretrained(tmp_path / "plan")
    return tmp_path / "plan"


@pytest.fixture
def adapted(plan: BitRankPlan, tiny_llama: TinyLlamaFactory) -> nn.Module:
    base = tiny_llama()
    base.name_or_path = base.config._name_or_path = "me/base"
    model = get_peft_model(base, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
    randomize_adapters(model)
    return model


@pytest.fixture
def adapter_folder(adapted: nn.Module, tmp_path: Path) -> Path:
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    word_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(params=["1GB", "20KB"])
def base_folder(tiny_llama: TinyLlamaFactory, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A quantized base in one file, or in several."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    config = AutoQRAQuantConfig(bits=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized", max_shard_size=request.param)
    word_tokenizer().save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


# ------------------------------------------------------------------------------------------------------ what goes up
def test_a_plan(hub: Hub, plan: BitRankPlan, plan_folder: Path) -> None:
    shared = prepare_folder(add_junk(plan_folder))
    assert (shared.kinds, shared.warnings) == ((PLAN,), ())
    assert set(shared.filenames) == {PLAN_FILE, CALIBRATION_FILE} | CARD
    push_folder(shared, PushTarget(repo_id="plan"))
    repository = hub.server.repository("me/plan")
    assert set(repository.files()) == set(shared.filenames)
    assert repository.find("main").message == "Upload plan"
    loaded = BitRankPlan.from_pretrained("me/plan")
    assert loaded == plan
    assert loaded.calibration.digest == plan.calibration.digest


def test_an_adapter(hub: Hub, adapted: nn.Module, adapter_folder: Path, tiny_llama: TinyLlamaFactory) -> None:
    tiny_llama().push_to_hub("me/base")
    shared = prepare_folder(add_junk(adapter_folder))
    assert (shared.kinds, shared.warnings) == ((ADAPTER,), ())
    assert set(shared.filenames) == ADAPTER_FILES | TOKENIZER_FILES
    assert {name.split("/")[0] for name in JUNK} == {name.rstrip("/") for name in shared.left_out}
    push_folder(shared, PushTarget(repo_id="me/adapter"))
    assert set(hub.server.repository("me/adapter").files()) == set(shared.filenames)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter")), logits(adapted))


def test_an_adapter_with_a_plan_beside_it(hub: Hub, plan: BitRankPlan, adapter_folder: Path) -> None:
    plan.save_pretrained(adapter_folder)
    shared = prepare_folder(adapter_folder)
    assert shared.kinds == (PLAN, ADAPTER)
    assert set(shared.filenames) == ADAPTER_FILES | TOKENIZER_FILES | {PLAN_FILE, CALIBRATION_FILE}
    push_folder(shared, PushTarget(repo_id="me/both"))
    assert hub.server.repository("me/both").find("main").message == "Upload plan and adapter"
    assert BitRankPlan.from_pretrained("me/both").initialization == "compensate"


def test_a_quantized_base(hub: Hub, base_folder: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(base_folder))
    weights = {path.name for path in base_folder.glob("model*")}
    shared = prepare_folder(add_junk(base_folder))
    assert (shared.kinds, shared.warnings) == ((QUANTIZED_BASE,), ())
    assert set(shared.filenames) == weights | TOKENIZER_FILES | CARD | {"config.json", "generation_config.json"}
    push_folder(shared, PushTarget(repo_id="me/quantized"))
    assert set(hub.server.repository("me/quantized").files()) == set(shared.filenames)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/quantized")), expected)


def test_a_plan_beside_a_dense_model(plan: BitRankPlan, tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    plan.save_pretrained(tmp_path)
    shared = prepare_folder(tmp_path)
    assert set(shared.filenames) == {PLAN_FILE, CALIBRATION_FILE} | CARD
    assert "model.safetensors" in shared.left_out


def test_the_calibration_of_another_time_stays_here(plan: BitRankPlan, plan_folder: Path) -> None:
    plan.replace(calibration=None, initialization="zero").save_pretrained(plan_folder)
    assert (plan_folder / CALIBRATION_FILE).exists()
    assert CALIBRATION_FILE not in prepare_folder(plan_folder).filenames


def test_pictures_of_the_card_go_with_it(plan_folder: Path) -> None:
    for name in ("bits.png", "other.png", "figures/ranks.svg"):
        (plan_folder / name).parent.mkdir(exist_ok=True)
        (plan_folder / name).write_bytes(b"picture")
    (plan_folder.parent / "secret.png").write_bytes(b"picture")
    text = (plan_folder / "README.md").read_text()
    links = '![a](./bits.png) <img src="figures/ranks.svg"> ![b](../secret.png) ![c](https://x/other.png) ![d](no.png)'
    (plan_folder / "README.md").write_text(text + links)
    shared = prepare_folder(plan_folder)
    assert {name for name in shared.filenames if name.endswith(("png", "svg"))} == {
        PICTURE_FILE,
        "bits.png",
        "figures/ranks.svg",
    }


def test_a_folder_without_a_card_gets_one(hub: Hub, adapter_folder: Path) -> None:
    (adapter_folder / "README.md").unlink()
    push_folder(prepare_folder(adapter_folder), PushTarget(repo_id="me/adapter"))
    assert b"peft_autoqra" in hub.server.repository("me/adapter").files()["README.md"]


def test_a_card_that_names_a_folder_as_base_model_is_mended(adapter_folder: Path) -> None:
    """TRL writes such cards."""
    (adapter_folder / "README.md").write_text("---\nbase_model: /home/me/m\n---\n")
    assert prepare_folder(adapter_folder).warnings == ()
    assert ModelCard.load(adapter_folder / "README.md").data.base_model != "/home/me/m"


def test_an_adapter_that_transformers_saved(
    hub: Hub, adapter_folder: Path, tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    tiny_llama().push_to_hub("me/base")
    model = tiny_llama()
    model.load_adapter(str(adapter_folder))
    model.save_pretrained(tmp_path / "again")
    assert prepare_folder(tmp_path / "again").kinds == (ADAPTER,)


def test_a_snapshot_of_the_hubs_cache(hub: Hub, adapter_folder: Path) -> None:
    """It is a folder of links into the blobs of its repository."""
    shared = prepare_folder(adapter_folder)
    push_folder(shared, PushTarget(repo_id="me/adapter"))
    snapshot = Path(snapshot_download("me/adapter"))
    assert (snapshot / ADAPTER_FILE).is_symlink()
    assert prepare_folder(snapshot).filenames == shared.filenames


# --------------------------------------------------------------------------------------------- what lies elsewhere
@pytest.fixture
def private(tmp_path: Path) -> Path:
    (tmp_path / "private.png").write_bytes(b"private")
    return tmp_path / "private.png"


def test_pictures_from_elsewhere_stay_here(plan_folder: Path, private: Path) -> None:
    card = plan_folder / "README.md"
    (plan_folder / "link.png").symlink_to(private)
    (plan_folder / "figures").symlink_to(private.parent)
    links = (f"{private}", "link.png", "figures/private.png", "./../private.png", f"./{private}")
    card.write_text(card.read_text() + "".join(f"![x]({link})" for link in links))
    shared = prepare_folder(plan_folder)
    assert set(shared.filenames) == {PLAN_FILE, CALIBRATION_FILE} | CARD
    assert {"link.png", "figures/"} <= set(shared.left_out)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "tokenizer.json", ADAPTER_FILE, "adapter_config.json"])
def test_links_to_files_elsewhere_are_refused(adapter_folder: Path, tmp_path: Path, name: str) -> None:
    (adapter_folder / "LICENSE").write_text("mine")
    shutil.move(adapter_folder / name, tmp_path / "elsewhere")
    (adapter_folder / name).symlink_to(tmp_path / "elsewhere")
    content = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(InvalidPlanError, match=rf"{name} is a link to {tmp_path / 'elsewhere'}, outside") as raised:
        prepare_folder(adapter_folder)
    assert "copy the file here" in str(raised.value)
    assert (tmp_path / "elsewhere").read_bytes() == content


def test_shards_that_are_links_are_refused(base_folder: Path, tmp_path: Path) -> None:
    shard = min(base_folder.glob("model*.safetensors"))
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidPlanError, match="is a link to"):
        prepare_folder(base_folder)


def test_the_picture_of_the_plan_is_not_written_through_a_link(plan: BitRankPlan, private: Path) -> None:
    folder = private.parent / "folder"
    folder.mkdir()
    (folder / PICTURE_FILE).symlink_to(private)
    plan.save_pretrained(folder)
    assert private.read_bytes() == b"private"
    assert PICTURE_FILE in prepare_folder(folder).filenames


def test_a_card_of_many_brackets_takes_no_time(plan_folder: Path) -> None:
    (plan_folder / "README.md").write_text("# Title\n" + "](" * 100_000)
    started = time.process_time()
    prepare_folder(plan_folder)
    assert time.process_time() - started < 2


# ----------------------------------------------------------------------------------------------------------- refused
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(change(tensors), path, metadata=metadata)


def drop_one(tensors):
    first = min(name for name in tensors if "lora_A" in name).split("lora_A")[0]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(first)}


def widen(tensors):
    return {n: np.concatenate([t, t]) if n.endswith("lora_A.weight") else t for n, t in tensors.items()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_patterns(path: Path, field: str, value: int) -> None:
    edit_json(path, **{field: dict.fromkeys(json.loads(path.read_text())[field], value)})


def name_folder(card: Path) -> None:
    """By hand, in a card that is complete otherwise."""
    text = re.sub("^base_model: .*$", "base_model: /home/me/m", card.read_text(), flags=re.MULTILINE)
    assert "/home/me/m" in text
    card.write_text(text)


DAMAGE = {
    "cut adapter": (lambda f: cut(f / ADAPTER_FILE), "damaged"),
    "cut calibration": (lambda f: cut(f / ADAPTER_CALIBRATION_FILE), "damaged"),
    "no calibration": (lambda f: (f / ADAPTER_CALIBRATION_FILE).unlink(), "missing beside the adapter"),
    "no weights": (lambda f: (f / ADAPTER_FILE).unlink(), f"{ADAPTER_FILE} is missing"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "cut configuration": (lambda f: cut(f / "adapter_config.json"), "cannot be read"),
    "a tensor missing": (lambda f: change_tensors(f / ADAPTER_FILE, drop_one), "is not of rank"),
    "other ranks": (lambda f: change_tensors(f / ADAPTER_FILE, widen), "is not of rank"),
    "unreadable card": (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "header of .* cannot be read"),
    "a card of a bomb": (
        lambda f: (f / "README.md").write_text("---\na: &a [1]\nbase_model: *a\n---\n"),
        "README.md cannot be read .*alias",
    ),
    "a card of no base": (lambda f: (f / "README.md").write_text("---\nbase_model: 7\n---\n"), "its base_model"),
    "nested configuration": (lambda f: (f / "adapter_config.json").write_text(nested(100_000)), "cannot be read"),
    "other bits": (lambda f: change_patterns(f / "adapter_config.json", "bits_pattern", 8), "8 bits and rank"),
    "other default rank": (lambda f: edit_json(f / "adapter_config.json", r=64), "and rank 64; save"),
    "other ranks by name": (
        lambda f: change_patterns(f / "adapter_config.json", "rank_pattern", 5),
        "and rank 5; save",
    ),
    "local base": (lambda f: name_folder(f / "README.md"), "'/home/me/m'"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter(adapter_folder: Path, damage, message: str) -> None:
    damage(adapter_folder)
    with pytest.raises(InvalidPlanError, match=message) as raised:
        prepare_folder(adapter_folder)
    assert str(adapter_folder) in str(raised.value)


def test_an_adapter_of_a_newer_version(adapter_folder: Path) -> None:
    edit_json(adapter_folder / "adapter_config.json", autoqra_version=99)
    with pytest.raises(InvalidPlanError, match="upgrade"):
        prepare_folder(adapter_folder)


PLAN_DAMAGE = {
    "cut plan": (lambda f: cut(f / PLAN_FILE), "damaged"),
    "cut calibration": (lambda f: cut(f / CALIBRATION_FILE), "damaged"),
    "no calibration": (lambda f: (f / CALIBRATION_FILE).unlink(), "missing beside the plan"),
}


@pytest.mark.parametrize(("damage", "message"), PLAN_DAMAGE.values(), ids=PLAN_DAMAGE)
def test_a_damaged_plan(plan_folder: Path, damage, message: str) -> None:
    damage(plan_folder)
    with pytest.raises(InvalidPlanError, match=message):
        prepare_folder(plan_folder)


def drop_shard(folder: Path) -> None:
    min(folder.glob("model*.safetensors")).unlink()


def swap_shards(folder: Path) -> None:
    shards = sorted(folder.glob("model*.safetensors"))
    if len(shards) > 1:
        shutil.copy(shards[0], shards[1])
    else:
        cut(shards[0])


def edit_quantization(path: Path, **changes) -> None:
    edit_json(path, quantization_config=json.loads(path.read_text())["quantization_config"] | changes)


BASE_DAMAGE = {
    "cut weights": (lambda f: cut(min(f.glob("model*.safetensors"))), "damaged"),
    "missing weights": (drop_shard, "There is no model.safetensors|is missing beside"),
    "mixed up weights": (swap_shards, "damaged|other tensors than its index"),
    "cut configuration": (lambda f: cut(f / "config.json"), "cannot be read"),
    "no modules": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "autoqra"}),
        "lists no",
    ),
    "nested configuration": (lambda f: (f / "config.json").write_text(nested(100_000)), "cannot be read"),
    "no architectures": (lambda f: edit_json(f / "config.json", architectures=5), "architectures"),
    "odd architectures": (lambda f: edit_json(f / "config.json", architectures=[{}]), "architectures"),
    "a plan elsewhere": (
        lambda f: edit_quantization(f / "config.json", plan=str(f.parent / "plan")),
        "no plan by name",
    ),
    "a plan on the hub": (lambda f: edit_quantization(f / "config.json", plan="someone/else"), "no plan by name"),
    "a pattern for ever": (
        lambda f: edit_quantization(f / "config.json", bits_pattern={"(a+)+$": 4}),
        r"\(a\+\)\+",
    ),
    "other JSON": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
}


@pytest.mark.parametrize(("damage", "message"), BASE_DAMAGE.values(), ids=BASE_DAMAGE)
def test_a_damaged_base(base_folder: Path, damage, message: str) -> None:
    damage(base_folder)
    with pytest.raises(InvalidPlanError, match=message):
        prepare_folder(base_folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": "../model.safetensors"}])
def test_an_index_that_lists_nothing(base_folder: Path, weight_map) -> None:
    (base_folder / "model.safetensors").unlink(missing_ok=True)
    (base_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidPlanError, match="does not list the files"):
        prepare_folder(base_folder)


def test_nothing_of_ours(plan_folder: Path, tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    with pytest.raises(InvalidPlanError, match="There is no folder"):
        prepare_folder(tmp_path / "nowhere")
    with pytest.raises(InvalidPlanError, match=rf"holds no plan .* Did you mean {re.escape(str(plan_folder))}\?"):
        prepare_folder(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(InvalidPlanError, match="AutoQRA did not quantize; push it with transformers"):
        prepare_folder(tmp_path / "dense")
    get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(InvalidPlanError, match="LORA that AutoQRA did not make; push it with PEFT"):
        prepare_folder(tmp_path / "lora")


def test_the_directory_of_a_search(plan: BitRankPlan, tmp_path: Path) -> None:
    plan.save_pretrained(tmp_path / "plan")
    (tmp_path / "search_result.json").write_text("{}")
    with pytest.raises(InvalidPlanError, match=rf"directory of a search.*push the plan in it, {tmp_path / 'plan'}"):
        prepare_folder(tmp_path)


def test_a_local_base_is_warned_of(adapter_folder: Path, plan: BitRankPlan, plan_folder: Path) -> None:
    for local in ("/home/me/model", str(plan_folder), None):
        edit_json(adapter_folder / "adapter_config.json", base_model_name_or_path=local)
        (warning,) = prepare_folder(adapter_folder).warnings
        assert f"base_model_name_or_path={local!r}" in warning
        assert "hub id" in warning
    plan.replace(base_model=BaseModelInfo(name_or_path="../model")).save_pretrained(plan_folder)
    (warning,) = prepare_folder(plan_folder).warnings
    assert "'../model'" in warning


# ---------------------------------------------------------------------------------------------------- the command line
def test_the_command_prints_what_goes_up_and_where(hub: Hub, plan_folder: Path, capsys) -> None:
    add_junk(plan_folder)
    argv = ["push", str(plan_folder), "--repo_id", "me/plan", "--private", "--revision", "dev"]
    assert cli.main([*argv, "--commit_message", "Three bits"]) == 0
    captured = capsys.readouterr()
    repository = hub.server.repository("me/plan")
    commit = repository.find("dev")
    assert (repository.private, commit.message, repository.files("main")) == (True, "Three bits", {})
    lines = captured.out.splitlines()
    assert lines[-1] == f"https://huggingface.co/me/plan/commit/{commit.sha}"
    sizes = {name: len(content) for name, content in repository.files("dev").items()}
    for name, num_bytes in (*sizes.items(), ("total", sum(sizes.values()))):
        assert re.search(rf"^{re.escape(name)} +{num_bytes:,}$", captured.out, re.MULTILINE)
    assert "left out: .git/, autoqra_other.safetensors, checkpoint-2/" in captured.out


def test_the_document_of_the_command(hub: Hub, plan_folder: Path, capsys) -> None:
    argv = ["push", str(plan_folder), "--repo_id", "me/plan", "--json"]
    assert cli.main([*argv, "--dry_run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert cli.main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == dry.keys() == documented_keys("push")
    files = hub.server.repository("me/plan").files()
    assert document["file_bytes"] == dry["file_bytes"] == {name: len(content) for name, content in files.items()}
    assert (document["kinds"], dry["commit_url"]) == (["plan"], None)
    assert document["commit_url"].endswith(hub.server.repository("me/plan").find("main").sha)


def test_plans_of_the_hub_are_shown_and_compared(hub: Hub, plan_folder: Path, capsys) -> None:
    plan = BitRankPlan.from_pretrained(plan_folder)
    plan.push_to_hub("me/plan")
    plan.replace(layers={name: LayerPlan(8, layer.rank) for name, layer in plan.items()}).push_to_hub(
        "me/plan", revision="dev"
    )
    hub.server.state.requests.clear()
    assert cli.main(["compare", "me/plan", "me/plan@dev", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [document[side]["place"] for side in ("first", "second")] == ["me/plan", "me/plan@dev"]
    assert {change["second"] for change in document["bits_changes"]} == {8}
    assert not any("calibration" in request.line for request in hub.server.requests())  # it may be large
    assert cli.main(["show", "me/nothing"]) == 4
    assert "me/nothing" in capsys.readouterr().err


def test_a_dry_run_asks_the_hub_nothing(hub: Hub, plan_folder: Path, capsys) -> None:
    assert cli.main(["push", str(plan_folder), "--repo_id", "me/plan", "--dry_run"]) == 0
    assert "dry run" in capsys.readouterr().out
    assert not hub.server.requests()


def test_a_pull_request_by_command(hub: Hub, plan_folder: Path, capsys) -> None:
    HfApi().create_repo("me/plan")
    argv = ["push", str(plan_folder), "--repo_id", "me/plan", "--create_pr", "--token", OTHER]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/plan/discussions/1"
    assert hub.server.repository("me/plan").files() == {}
    assert PLAN_FILE in hub.server.repository("me/plan").files("refs/pr/1")


def test_warnings_of_the_command(hub: Hub, adapter_folder: Path, capsys) -> None:
    edit_json(adapter_folder / "adapter_config.json", base_model_name_or_path="/home/me/model")
    assert cli.main(["push", str(adapter_folder), "--repo_id", "me/adapter"]) == 0
    captured = capsys.readouterr()
    warning = next(line for line in captured.err.splitlines() if line.startswith("autoqra push: warning:"))
    assert "/home/me/model" in warning


@pytest.mark.parametrize(
    ("damage", "flags", "status", "words"),
    [
        (lambda f: cut(f / PLAN_FILE), [], 2, ["damaged"]),
        (lambda f: None, ["--create_pr", "--revision", "dev"], 4, ["leave out revision='dev'"]),
        (lambda f: None, ["--token", "hf_expired"], 4, ["me/plan", "401"]),
        (lambda f: None, ["--repo_id", "other/plan"], 4, ["other/plan", "403"]),
        (lambda f: None, ["--repo_id", "not a name"], 4, ["'not a name' is no repository name"]),
        (lambda f: None, ["--privat"], 2, ["--privat"]),
        (lambda f: shutil.rmtree(f), [], 2, ["There is no folder"]),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(
    hub: Hub, plan_folder: Path, capsys, damage, flags, status, words
) -> None:
    damage(plan_folder)
    argv = ["push", str(plan_folder), "--repo_id", "me/plan", *flags]
    fails_with_one_line(capsys, argv, *words, status=status)
    assert not hub.server.state.repositories


def test_a_repository_has_to_be_named(capsys, plan_folder: Path) -> None:
    fails_with_one_line(capsys, ["push", str(plan_folder)], "--repo_id")


def test_an_interrupted_push_of_a_folder_shows_nothing(hub: Hub, base_folder: Path) -> None:
    fault = hub.server.fail("PUT", "cut")
    target = PushTarget(repo_id="me/quantized")
    with pytest.raises(HubError, match="not committed"):
        push_folder(prepare_folder(base_folder), target)
    assert hub.server.repository("me/quantized").files() == {}
    fault.times = 0
    push_folder(prepare_folder(base_folder), target)
    assert hub.server.repository("me/quantized").files()
