"""Readers that know nothing of patterns and rank stabilization compute what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_autoqra.errors import ExportError
from peft_autoqra.export.plain_lora import PlainLora, export_plain_lora
from peft_autoqra.plan_file import ADAPTER_FILE
from tests.export.models import Trained, tiny_qwen2, train
from tests.tuner.synthetic import logits, randomize_adapters

# A float32 product of 64 to 128 terms is off by some 1e-7 of their size; scaled before or after the sum it differs by
# that. Logits are below 2 here, and half the scale moves them by more than 1e-2.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_llama) -> Trained:
    return train(tiny_llama(), tmp_path_factory.mktemp("one"), lora_alpha=5)


def read_as_vllm(folder: Path) -> dict[str, np.ndarray]:
    """Module name to what is added to its weight, by the rule of vLLM before it read patterns: one scale for all."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(folder / ADAPTER_FILE)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert all(tensors[f"{name}.lora_A.weight"].shape[0] == config["r"] for name in names)
    assert len(tensors) == 2 * len(names)
    return {
        name.removeprefix("base_model.model."): scale
        * (tensors[f"{name}.lora_B.weight"].astype(np.float64) @ tensors[f"{name}.lora_A.weight"])
        for name in names
    }


def read_as_llama_cpp(folder: Path) -> dict[str, np.ndarray]:
    """The same by llama.cpp's rule: alpha of the file over each tensor's own rank."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / ADAPTER_FILE)
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A.weight" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            module_name = name.replace("base_model.model.", "").replace(".lora_A.weight", "")
            deltas[module_name] = alpha / b.shape[1] * (b.astype(np.float64) @ a)
    return deltas


def with_deltas(base: nn.Module, deltas: dict[str, np.ndarray]) -> Tensor:
    for name, delta in deltas.items():
        base.get_submodule(name).weight.data += torch.from_numpy(delta).float()
    return logits(base)


def test_peft_without_this_package_computes_what_was_trained(exported):
    tolerance = {"rtol": 0.02, "atol": 0.02} if exported.lora_logits.dtype == torch.bfloat16 else ROUNDING
    torch.testing.assert_close(exported.lora_logits, exported.trained.logits, **tolerance)


@pytest.mark.parametrize("name", ["llama-tied", "llama", "qwen2"])
def test_every_reader_computes_what_was_trained(all_exports, name):
    exported = all_exports[name]
    for read in (read_as_vllm, read_as_llama_cpp):
        base = AutoModelForCausalLM.from_pretrained(exported.base)
        torch.testing.assert_close(with_deltas(base, read(exported.lora)), exported.trained.logits, **ROUNDING)
    base = AutoModelForCausalLM.from_pretrained(exported.base)
    without_scale = {name: delta / 2 for name, delta in read_as_vllm(exported.lora).items()}
    assert (with_deltas(base, without_scale) - exported.trained.logits).abs().max() > 1e-2


def test_the_adapter_itself_is_misread_by_the_rule_of_one_scale(one):
    """Why there is an export: were it not needed, the test above would prove nothing."""
    config = json.loads((one.adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    with pytest.raises(AssertionError):
        read_as_vllm(one.adapter)


def test_files_hold_ordinary_lora_only(one, tmp_path):
    export_plain_lora(one.adapter, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert (config["rank_pattern"], config["alpha_pattern"], config["peft_type"]) == ({}, {}, "LORA")
    assert config["base_model_name_or_path"] == str(one.base)
    assert config.keys() <= LoraConfig().to_dict().keys()
    with safe_open(tmp_path / "lora" / ADAPTER_FILE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118 - no mapping
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "16-bit base it is approximate" in card
    assert "--max-lora-rank 8`" in card


def test_the_same_adapter_gives_the_same_bytes(one, tmp_path):
    for name in ("first", "second"):
        export_plain_lora(one.adapter, tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize(("rank", "max_lora_rank"), [(8, 8), (9, 16), (64, 64), (300, 320), (513, None)])
def test_larger_ranks_are_padded_with_zeros(one, tmp_path, rank, max_lora_rank):
    lora = export_plain_lora(one.adapter, tmp_path / "lora", rank=rank)
    assert (lora.config.r, lora.vllm_max_lora_rank) == (rank, max_lora_rank)
    name = "base_model.model.model.layers.0.self_attn.q_proj"  # rank 4 in the plan
    a, b = lora.tensors[f"{name}.lora_A.weight"], lora.tensors[f"{name}.lora_B.weight"]
    assert (a.shape, b.shape) == ((rank, 64), (64, rank))
    assert not a[4:].any()
    assert not b[:, 4:].any()
    assert a[:4].any()


def test_a_loaded_model_gives_the_same_as_its_folder(one, tmp_path):
    saved = export_plain_lora(one.adapter, tmp_path / "saved")
    loaded = export_plain_lora(one.model, tmp_path / "loaded")
    assert saved.config.to_dict() == loaded.config.to_dict()
    assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in saved.tensors.items())
    with pytest.raises(ExportError, match=r"no adapter 'second'; it has \['default'\]"):
        export_plain_lora(one.model, tmp_path / "loaded", adapter_name="second")


def export_lora(model: nn.Module, tmp_path: Path, **settings) -> tuple[PlainLora, nn.Module]:
    peft_model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    randomize_adapters(peft_model)
    return export_plain_lora(peft_model, tmp_path / "lora"), peft_model


def test_alpha_patterns_are_folded_in(tiny_llama, tmp_path):
    """Of a plain adapter with scales of its own, which some readers do not know either."""
    patterns = {"rank_pattern": {r"layers\.0\..*up_proj": 6}, "alpha_pattern": {"v_proj": 3, r".*1\.mlp.*": 7}}
    _, model = export_lora(tiny_llama(), tmp_path, target_modules=["v_proj", "up_proj"], lora_alpha=2, **patterns)
    deltas = read_as_vllm(tmp_path / "lora")
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    assert deltas.keys() == layers.keys()
    assert len({layer.scaling["default"] for layer in layers.values()}) == 3
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(deltas[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # what is looked at here
def test_embeddings_are_kept(tiny_llama, tmp_path):
    """vLLM and llama.cpp read lora_embedding_A and _B; the copy of the embedding beside them is left out."""
    model = get_peft_model(
        tiny_llama(tie_word_embeddings=False),
        LoraConfig(r=4, lora_alpha=3, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    )
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter" / ADAPTER_FILE))
    lora = export_plain_lora(tmp_path / "adapter", tmp_path / "lora", rank=8)
    name = "base_model.model.model.embed_tokens.lora_embedding"
    a, b = lora.tensors[f"{name}_A"], lora.tensors[f"{name}_B"]
    assert (a.shape, b.shape) == ((8, 128), (64, 8))
    expected = model.get_base_model().model.embed_tokens.get_delta_weight("default")
    torch.testing.assert_close((b @ a).T, expected, rtol=1e-5, atol=1e-6)
    assert not any("base_layer" in tensor for tensor in lora.tensors)


# --------------------------------------------------------------------------------------------------------- refusals


def refuses(tmp_path: Path, adapter, *words: str, **options) -> None:
    with pytest.raises(ExportError) as caught:
        export_plain_lora(adapter, tmp_path / "refused", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, ["DoRA"]),
        ({"bias": "all"}, ["trained biases"]),
        ({"modules_to_save": ["lm_head"]}, ["fully trained modules"]),
        ({"trainable_token_indices": [1, 2]}, ["trained token embeddings"]),
        ({"alora_invocation_tokens": [3]}, ["activated LoRA"]),
        ({"modules_to_save": ["lm_head"], "use_dora": True}, ["DoRA, fully trained modules"]),
    ],
)
def test_more_than_plain_lora_is_refused(tmp_path, settings, words):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    refuses(tmp_path, get_peft_model(tiny_qwen2(), config), *words, "export the merged model instead")


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes the bias for a piece of a sharded tensor
def test_a_bias_of_b_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_bias=True)
    refuses(tmp_path, get_peft_model(tiny_qwen2(), config), "a bias of B")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_changed_their_base_are_refused(tiny_llama, tmp_path, init):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    refuses(tmp_path, get_peft_model(tiny_llama(), config), init)


def test_too_small_a_rank(one, tmp_path):
    refuses(tmp_path, one.adapter, "rank=4", "largest rank, 8", rank=4)


def test_no_adapter_there(one, tmp_path):
    refuses(tmp_path, one.base, "adapter_config.json", str(one.base))


def copy_of(adapter: Path, folder: Path, tensors: dict[str, Tensor] | None = None, **settings) -> Path:
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    if tensors is None:
        (folder / ADAPTER_FILE).write_bytes((adapter / ADAPTER_FILE).read_bytes())
    else:
        save_file(tensors, folder / ADAPTER_FILE)
    return folder


LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, ["no LoRA layers"]),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, ["lm_head.weight", "neither A nor B"]),
        ({f"{LAYER}.lora_A.weight": torch.ones(2, 64)}, [LAYER.removeprefix("base_model.model."), "(2, 64)"]),
        (
            {f"{LAYER}.lora_A.weight": torch.ones(2, 64), f"{LAYER}.lora_B.weight": torch.ones(128, 3)},
            ["(128, 3)"],
        ),
        (
            {f"{LAYER}.lora_A.weight": torch.ones(2, 4, 3, 3), f"{LAYER}.lora_B.weight": torch.ones(8, 2, 1, 1)},
            ["Convolutions"],
        ),
    ],
)
def test_tensors_that_are_not_plain_lora(one, tmp_path, tensors, words):
    refuses(tmp_path, copy_of(one.adapter, tmp_path / "copy", tensors), *words)


def test_damaged_and_other_adapters(one, tmp_path):
    refuses(tmp_path, copy_of(one.adapter, tmp_path / "ia3", peft_type="IA3"), "is not LoRA")
    damaged = copy_of(one.adapter, tmp_path / "damaged")
    (damaged / ADAPTER_FILE).write_bytes(b"nothing")
    refuses(tmp_path, damaged, "damaged")
    (damaged / "adapter_config.json").write_text("{")
    refuses(tmp_path, damaged, "damaged")
