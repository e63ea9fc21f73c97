"""Checkpoints that transformers reads without this package, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_autoqra import AutoQRAConfig
from peft_autoqra.errors import ExportError, HubError, PlanMismatchError
from peft_autoqra.export import merged_model
from peft_autoqra.export.gguf_recipe import export_gguf_recipe
from peft_autoqra.export.merged_model import export_dequantized_base, export_merged_model
from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.quant.backends import QUANTIZED_LAYERS
from tests.export.models import Trained, train
from tests.tiny_data import word_tokenizer
from tests.tuner.synthetic import logits, mixed_plan, randomize_adapters


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_llama) -> Trained:
    return train(tiny_llama(), tmp_path_factory.mktemp("one"))


def reloaded(trained: Trained) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), trained.adapter)


def test_merged_logits_are_exact(exported):
    merged = reloaded(exported.trained).merge_and_unload()
    assert torch.equal(exported.merged_logits, logits(merged))
    # merging rounds W + scale B A to the dtype of W, once
    tolerance = {"rtol": 0.05, "atol": 0.05} if merged.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(exported.merged_logits, exported.trained.logits, **tolerance)


def test_dequantized_weights_are_those_of_training(exported):
    """Every tensor of the file is the base's own, or what a quantized layer computes with."""
    model = reloaded(exported.trained)
    layers = {n: m.get_base_layer() if hasattr(m, "lora_A") else m for n, m in model.get_base_model().named_modules()}
    original, found = (load_file(folder / "model.safetensors") for folder in (exported.trained.base, exported.base))
    assert found.keys() == original.keys()
    num_quantized = 0
    for name, tensor in found.items():
        layer = layers[name.rpartition(".")[0]]
        quantized = isinstance(layer, QUANTIZED_LAYERS) and name.endswith(".weight")
        num_quantized += quantized
        assert torch.equal(tensor, layer.dequantize() if quantized else original[name]), name
    assert num_quantized > 8


def test_checkpoints_are_ordinary(exported):
    for folder in (exported.merged, exported.base):
        config = json.loads((folder / "config.json").read_text())
        assert not any("quant" in key or "autoqra" in key for key in config)
        assert config["dtype"] == json.loads((exported.trained.base / "config.json").read_text())["dtype"]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (exported.trained.base / name).read_bytes()


def test_another_dtype(one, tmp_path):
    export_merged_model(one.adapter, tmp_path / "float32")
    export_merged_model(one.adapter, tmp_path / "float16", dtype=torch.float16)
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "float16"))
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in full.items())


def test_training_in_another_dtype_than_the_checkpoint(tiny_llama, tmp_path):
    """The quantized weights are those of the dtype that was trained in, not those of the file."""
    tiny_llama().save_pretrained(tmp_path / "base")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = get_peft_model(dense, AutoQRAConfig(bits=3, r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(PlanMismatchError, match="in the same dtype"):
        export_dequantized_base(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_dequantized_base(tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16)
    layer = model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, layer.dequantize())


def test_the_adapters_tokenizer_goes_before_the_bases(tiny_llama, tmp_path):
    trained = train(tiny_llama(), tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(trained.adapter)
    export_merged_model(trained.adapter, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "of the adapter"


def test_a_base_from_the_hubs_cache(tiny_llama, tmp_path, monkeypatch):
    """Without a network, as in all tests, and although the cache lacks most files that a tokenizer may have."""
    trained = train(tiny_llama(), tmp_path)
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(trained.base, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = merged_model._tokenizer_files("someone/tiny", None)
    assert list(files) == ["tokenizer.json", "tokenizer_config.json"]
    with pytest.raises(ExportError, match="neither a folder here nor reachable"):
        merged_model._tokenizer_files("someone/other", None)


def test_without_any_tokenizer(tiny_llama, tmp_path):
    trained = train(tiny_llama(), tmp_path)
    for path in trained.base.glob("tokenizer*"):
        path.unlink()
    export_merged_model(trained.adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*token*"))
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - trained.logits).abs().max() < 1e-5


def test_every_file_of_a_tokenizer_is_copied(tiny_llama, tmp_path):
    """Other kinds than the tokenizers of these tests have, too; and generation settings alone are no tokenizer."""
    trained = train(tiny_llama(), tmp_path)
    (trained.adapter / "generation_config.json").write_text("{}")
    names = {"tekken.json", "qwen.tiktoken", "processor_config.json", "additional_chat_templates/tools.jinja"}
    (trained.base / "additional_chat_templates").mkdir()
    for name in names:
        (trained.base / name).write_text(name)
    export_dequantized_base(trained.adapter, tmp_path / "out")
    assert {name for name in names if (tmp_path / "out" / name).read_text() == name} == names


def test_fully_trained_modules_and_dora_are_merged(tiny_llama, tmp_path):
    """What plain LoRA cannot hold."""
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = AutoQRAConfig(bits=8, r=2, use_dora=True, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(dense, config)
    randomize_adapters(model)
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    export_merged_model(tmp_path / "adapter", tmp_path / "merged")
    export_dequantized_base(tmp_path / "adapter", tmp_path / "deq")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4
    )
    original, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "deq"))
    assert torch.equal(found["lm_head.weight"], original["lm_head.weight"])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_added_tokens(tiny_llama, tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plan = mixed_plan(dense)
    dense.resize_token_embeddings(131)
    model = get_peft_model(dense, AutoQRAConfig(plan=plan, modules_to_save=["embed_tokens", "lm_head"]))
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    export_merged_model(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 131
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("export", [export_merged_model, export_dequantized_base])
@pytest.mark.parametrize(
    ("settings", "reason"), [({"seed": 1}, "Load the same base model"), ({"num_hidden_layers": 1}, "match no module")]
)
def test_another_base(one, tiny_llama, tmp_path, export, settings, reason):
    tiny_llama(**settings).save_pretrained(tmp_path / "other")
    words = rf"/other' is not the base model that the adapter was trained on \('{one.base}'\).*{reason}"
    with pytest.raises(PlanMismatchError, match=words):
        export(one.adapter, tmp_path / "out", model_name_or_path=str(tmp_path / "other"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_base_that_has_moved(tiny_llama, tmp_path):
    trained = train(tiny_llama(), tmp_path)
    moved = trained.base.rename(tmp_path / "moved")
    with pytest.raises(ExportError, match="/base' is neither a folder here nor reachable"):
        export_merged_model(trained.adapter, tmp_path / "out")
    export_merged_model(trained.adapter, tmp_path / "out", model_name_or_path=str(moved))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_no_base_named(tiny_llama, tmp_path):
    trained = train(tiny_llama(), tmp_path)
    path = trained.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ExportError, match="does not name its base model; give --model_name_or_path"):
        export_merged_model(trained.adapter, tmp_path / "out")


@pytest.mark.parametrize("damage", ["weights", "config"])
def test_a_base_that_cannot_be_loaded(tiny_llama, tmp_path, damage):
    trained = train(tiny_llama(), tmp_path)
    name = "model.safetensors" if damage == "weights" else "config.json"
    (trained.base / name).write_text("nothing")
    with pytest.raises(ExportError, match="cannot be loaded"):
        export_merged_model(trained.adapter, tmp_path / "out")


def test_damaged_and_missing_weights_of_the_adapter(tiny_llama, tmp_path):
    trained = train(tiny_llama(), tmp_path)
    (trained.adapter / ADAPTER_FILE).write_bytes(b"nothing")
    with pytest.raises(ExportError, match="damaged"):
        export_merged_model(trained.adapter, tmp_path / "out")
    (trained.adapter / ADAPTER_FILE).unlink()
    with pytest.raises(ExportError, match=f"no {ADAPTER_FILE}"):
        export_merged_model(trained.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_of_this_package(tiny_llama, one, tmp_path: Path):
    with pytest.raises(ExportError, match=r"/base' holds no adapter: there is no adapter_config.json; give"):
        export_merged_model(one.base, tmp_path / "out")
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    with pytest.raises(ExportError, match=r"was not made by peft_autoqra"):
        export_merged_model(tmp_path / "plain", tmp_path / "out")


@pytest.mark.parametrize("damage", ["nothing", "[]"])
def test_a_damaged_configuration_of_the_adapter(one, tmp_path, damage):
    shutil.copytree(one.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(damage)
    with pytest.raises(ExportError, match=r"adapter_config\.json"):
        export_merged_model(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("export", [export_merged_model, export_dequantized_base, export_gguf_recipe])
def test_an_adapter_that_cannot_be_downloaded(tmp_path, export):
    """The hub's own reason; all tests run without it."""
    with pytest.raises(HubError, match="'someone/private' is not in the cache, and downloads are switched off"):
        export("someone/private", tmp_path / "out")
    assert not list(tmp_path.iterdir())
