"""The README.md that lies beside a quantized base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from peft_autoqra import AutoQRAConfig, AutoQRAQuantConfig, complete_model_card
from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.readme import END
from peft_autoqra.streaming.base_card import BASE_MODEL_KEY
from peft_autoqra.units import format_bytes
from tests.conftest import TinyLlamaFactory
from tests.streaming.bases import load_dense, load_streaming, save_base
from tests.streaming.test_quantized_checkpoint import save_quantized


def test_card_of_a_saved_base(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=3))
    model.config._name_or_path = "someone/some-model"  # as from the hub
    model.save_pretrained(tmp_path / "quantized")
    complete_model_card(tmp_path / "quantized")
    card = tmp_path / "quantized" / "README.md"
    assert metadata_load(card) == {
        "library_name": "transformers",
        "base_model": "someone/some-model",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["autoqra", "quantization"],
    }
    text = card.read_text()
    for part in ("# some-model, quantized", "RANDOM WEIGHTS", "14 at 3 bits", "| 0-1 | 3 | 3 | 3 | 3 | 3 | 3 | 3 |"):
        assert part in text
    code = text.split("```python")[1]
    assert code.index("import peft_autoqra") < code.index("from transformers import AutoModelForCausalLM")
    Image.open(tmp_path / "quantized" / "autoqra_plan.png").verify()
    complete_model_card(tmp_path / "quantized")
    assert card.read_text() == text


def test_bytes_are_those_of_the_files(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, plan, folder = save_quantized(tiny_llama, tmp_path, shard_size="20KB")
    complete_model_card(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    names = set(plan)
    planned = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] in names and not name.endswith("bias")
    )
    dense = sum(2 * n * k for n, k in plan.shapes.values())
    doubled = sum(2 * n * k for name, (n, k) in plan.shapes.items() if plan[name].bits == 16)  # float32 in the file
    text = (folder / "README.md").read_text()
    assert f"| these layers | {format_bytes(planned - doubled)}; at 16 bits {format_bytes(dense)} |" in text
    without = size - (planned - doubled) + dense  # all else stays as it is in the file
    assert f"| whole model | {format_bytes(size)}; with these layers at 16 bits {format_bytes(without)} |" in text


def test_what_a_stranger_wrote_becomes_no_code(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, _, folder = save_quantized(tiny_llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["X\nimport os"]}))
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", BASE_MODEL_KEY: f"a\n# {END}"})
    complete_model_card(folder)
    text = (folder / "README.md").read_text()
    assert "import AutoModel\n" in text
    assert "import os" not in text
    assert text.count(END) == 1
    assert "base_model" not in metadata_load(folder / "README.md")


def test_without_a_hub_id_no_base_is_named(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, _, folder = save_quantized(tiny_llama, tmp_path)
    complete_model_card(folder)
    assert "base_model" not in metadata_load(folder / "README.md")
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_what_push_to_hub_writes_is_tagged(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, _, folder = save_quantized(tiny_llama, tmp_path)
    assert load_dense(folder).model_tags == ["autoqra", "quantization"]


def test_a_base_that_was_quantized_in_place(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), AutoQRAConfig(bits=4, r=4, task_type="CAUSAL_LM")).unload()
    model.config._name_or_path = "someone/some-model"
    model.save_pretrained(tmp_path)
    complete_model_card(tmp_path)
    assert model.model_tags == ["autoqra", "quantization"]
    assert metadata_load(tmp_path / "README.md")["base_model"] == "someone/some-model"
    assert "| 0-1 | 4 | 4 | 4 | 4 | 4 | 4 | 4 |" in (tmp_path / "README.md").read_text()


def test_other_folders_are_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    for folder in (save_base(tiny_llama, tmp_path), tmp_path / "missing"):
        with pytest.raises(InvalidPlanError, match="no adapter, quantized base or plan"):
            complete_model_card(folder)
    assert not (tmp_path / "base" / "README.md").exists()


def test_a_newer_format_is_refused(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    _, _, folder = save_quantized(tiny_llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["autoqra_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidPlanError, match="upgrade"):
        complete_model_card(folder)
