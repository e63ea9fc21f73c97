"""Every push of transformers and PEFT passes our model cards, and none may fail because of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.readme import BEGIN
from tests.conftest import TinyLlamaFactory
from tests.hostile_files import nested
from tests.hub.conftest import Hub
from tests.tiny_data import word_tokenizer


def push_tokenizer(folder: Path) -> None:
    word_tokenizer().save_pretrained(folder, push_to_hub=True, repo_id="me/somebodys")


def test_what_others_push_goes_up_as_it_is(hub: Hub, tiny_llama: TinyLlamaFactory) -> None:
    lora = LoraConfig(r=2, task_type="CAUSAL_LM")
    objects = {"model": tiny_llama(), "lora": get_peft_model(tiny_llama(), lora), "tokenizer": word_tokenizer()}
    for name, pushed in (objects | {"config": tiny_llama().config}).items():
        pushed.push_to_hub(f"me/{name}")  # a warning would be an error
        files = hub.server.repository(f"me/{name}").files()
        assert len(files) > 1
        assert BEGIN.encode() not in files.get("README.md", b"")


def test_an_adapter_of_a_type_that_this_peft_does_not_know(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "TOMORROW", "rank": 3}))
    (tmp_path / ADAPTER_FILE).write_bytes(b"weights")
    push_tokenizer(tmp_path)
    assert "tokenizer.json" in hub.server.repository("me/somebodys").files()
    assert not (tmp_path / "README.md").exists()


QUANTIZED = {"quant_method": "autoqra", "modules": {"a": {"bits": 16, "shape": [4, 4]}}}
DAMAGED = {
    "adapter of a newer version": ("adapter_config.json", '{"peft_type": "LORA", "autoqra_version": 99}'),
    "adapter of an unknown type": ("adapter_config.json", '{"peft_type": ["LORA"], "autoqra_version": 1}'),
    "adapter's configuration is a list": ("adapter_config.json", "[]"),
    "adapter without weights": ("adapter_config.json", '{"peft_type": "LORA", "autoqra_version": 1}'),
    "deep adapter": ("adapter_config.json", nested(100_000)),
    "deep model": ("config.json", nested(100_000)),
    "model with odd modules": (
        "config.json",
        json.dumps({"quantization_config": {"quant_method": "autoqra", "modules": [1]}}),
    ),
    "model with odd architectures": (
        "config.json",
        json.dumps({"quantization_config": QUANTIZED, "architectures": 5}),
    ),
    "model without weights": ("config.json", json.dumps({"quantization_config": QUANTIZED})),
}


@pytest.mark.parametrize(("name", "content"), DAMAGED.values(), ids=DAMAGED)
def test_a_card_that_cannot_be_written_is_a_warning(hub: Hub, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning, match="model card will say nothing of the plan"):
        push_tokenizer(tmp_path)
    assert "tokenizer.json" in hub.server.repository("me/somebodys").files()
