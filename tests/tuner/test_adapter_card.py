"""The README.md that lies beside an adapter."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load
from peft import PeftModel, get_peft_model
from PIL import Image

from peft_autoqra import AutoQRAQuantConfig, complete_model_card, plan_picture
from peft_autoqra.memory import MemoryModel
from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.readme import BEGIN, END
from peft_autoqra.tuner.config import AutoQRAConfig
from tests.conftest import TinyLlamaFactory
from tests.streaming.bases import adapt, load_dense, load_streaming, save_base
from tests.tuner.synthetic import mixed_plan
from tests.tuner.test_trainers import make_trainer


def adapter_of(model: Any, **settings: Any) -> tuple[PeftModel, BitRankPlan]:
    plan = mixed_plan(model)
    memory = MemoryModel.from_model(model).estimate(plan)
    provenance = {"held_out_loss": 2.71828, "steps": 30, "budget_bytes": 1_500_000, "budget_scope": "training"}
    plan = plan.replace(memory=memory, provenance=provenance)
    return get_peft_model(model, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"), **settings), plan


def section_of(folder: Path) -> str:
    text = (folder / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    return text.split(BEGIN)[1].split(END)[0]


def test_card_of_a_saved_adapter(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = tiny_llama()
    base.config._name_or_path = base.name_or_path = "someone/some-model"
    model, plan = adapter_of(base)
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # "auto" asks the hub
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "someone/some-model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [
            "base_model:adapter:someone/some-model",
            "lora",
            "transformers",
            "autoqra",
            "quantization",
        ],
    }
    section = section_of(tmp_path)
    assert plan.memory is not None
    for text in (
        "2.7183 after 30 steps",
        "1.5 MB (training)",
        f"| optimizer states | {plan.memory.optimizer_bytes:,} |",
        str(plan.base_model.fingerprint),
        "*unquantized*",
        "peft 0.",
        "merge_and_unload()",
        "(autoqra_plan.png)",
    ):
        assert text in section
    code = section.split("```python")[1]
    assert code.index("import peft_autoqra") < code.index("from peft import AutoPeftModelForCausalLM")
    Image.open(tmp_path / "autoqra_plan.png").verify()


def test_its_table_is_the_plan(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, plan = adapter_of(tiny_llama())
    model.save_pretrained(tmp_path)
    lines = [
        line.strip("| ").split(" | ") for line in section_of(tmp_path).splitlines() if re.match(r"\| (layer|\d)", line)
    ]
    found = {(row[0], column): cell for row in lines[1:] for column, cell in zip(lines[0][1:], row[1:], strict=True)}
    expected = {
        (name.split(".")[2], name.split(".")[-1]): f"{layer.bits}/{layer.rank}" for name, layer in plan.items()
    }
    assert found == expected


def test_saving_again_changes_nothing_and_keeps_what_was_written_by_hand(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    model, _ = adapter_of(tiny_llama())
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    first = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == first
    card.write_text(first.replace("license: mit\n", "").replace("## Uses\n", "## Uses\n\nFor tests.\n"))
    mine = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == mine


def test_a_local_base_stays_out_of_the_header(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = tiny_llama()
    base.config._name_or_path = base.name_or_path = str(tmp_path)
    model, _ = adapter_of(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    header = (tmp_path / "adapter" / "README.md").read_text().split("---\n")[1]
    assert str(tmp_path) not in header
    assert "base_model" not in header


def test_an_adapter_of_another_name_has_its_card_in_its_folder(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, plan = adapter_of(tiny_llama(), adapter_name="other")
    model.save_pretrained(tmp_path)
    assert "How to load" in section_of(tmp_path / "other")
    assert metadata_load(tmp_path / "other" / "README.md")["pipeline_tag"] == "text-generation"
    assert (tmp_path / "other" / "autoqra_plan.png").exists()
    assert BEGIN not in (tmp_path / "README.md").read_text()
    assert BitRankPlan.from_pretrained(tmp_path / "other") == plan


def test_an_unreadable_card_stops_no_save(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, plan = adapter_of(tiny_llama(), adapter_name="other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="left as it is"):
        model.save_pretrained(tmp_path)
    assert BitRankPlan.from_pretrained(tmp_path / "other") == plan


@pytest.mark.parametrize(
    ("task_type", "auto_class"),
    [(None, "AutoPeftModel"), ("SEQ_CLS", "AutoPeftModelForSequenceClassification")],
)
def test_the_class_that_loads_it(tiny_llama: TinyLlamaFactory, task_type: str | None, auto_class: str) -> None:
    config = AutoQRAConfig(plan=mixed_plan(tiny_llama()), task_type=task_type)
    assert f"\nfrom peft import {auto_class}\n" in config.card().section(())


def test_card_of_an_adapter_on_a_quantized_base(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    base = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=4))
    base.save_pretrained(tmp_path / "quantized")
    adapt(load_dense(tmp_path / "quantized")).save_pretrained(tmp_path / "adapter")
    section = section_of(tmp_path / "adapter")
    assert "quantized base is downloaded" in section
    assert "RANDOM WEIGHTS" in section
    for text in ("quantized again", "unquantized", "quantization_config", "16-bit base"):
        assert text not in section
    # and so it stays, wherever it is read
    for folder in (tmp_path / "quantized", tmp_path / "base"):
        again = PeftModel.from_pretrained(load_dense(folder), tmp_path / "adapter")
        again.save_pretrained(tmp_path / "again")
        assert section_of(tmp_path / "again") == section


def test_a_base_that_was_quantized_while_loading_or_in_place_has_weights_in_its_files(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    streamed = load_streaming(save_base(tiny_llama, tmp_path), AutoQRAQuantConfig(bits=4))
    in_place = adapt(load_dense(tmp_path / "base")).unload()
    for number, base in enumerate((streamed, in_place)):
        adapt(base).save_pretrained(tmp_path / str(number))
        assert "quantized again" in section_of(tmp_path / str(number))


def test_an_adapter_of_a_searched_plan_shows_the_search(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    point = {"total_bytes": 7000, "loss": 3.0, "difference": 0.0, "interval": None, "num_seeds": 1}
    record = {"points": [point | {"stage": "evolution", "name": "winner"}]}
    AutoQRAConfig(plan=mixed_plan(tiny_llama()).replace(provenance=record)).card().write(tmp_path)
    assert "](autoqra_front.png)" in section_of(tmp_path)
    Image.open(tmp_path / "autoqra_front.png").verify()


def test_a_name_with_a_marker_does_not_end_the_section(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    config = AutoQRAConfig(plan=mixed_plan(tiny_llama()), base_model_name_or_path=f"a`\n{END}\nb")
    config.card().write(tmp_path)
    assert "trained on a\\`" in section_of(tmp_path)  # which holds one marker of each kind


def test_every_checkpoint_of_a_trainer_has_a_card_and_the_picture_is_drawn_once(
    tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = mixed_plan(tiny_llama())
    plan_picture._draw.cache_clear()
    trainer = make_trainer(tiny_llama(), tmp_path, AutoQRAConfig(plan=plan), save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Quick start" in text  # TRL's
    assert text.index(BEGIN) < text.index("## Quick start")
    tags = metadata_load(tmp_path / "README.md")["tags"]
    assert {"autoqra", "lora", "quantization", "trl", "sft"} <= set(tags)
    pictures = {(folder / "autoqra_plan.png").read_bytes() for folder in (tmp_path, *tmp_path.glob("checkpoint-*"))}
    assert len(pictures) == 1
    Image.open(io.BytesIO(pictures.pop())).verify()
    assert [section_of(folder) == section_of(tmp_path) for folder in tmp_path.glob("checkpoint-*")] == [True, True]
    assert plan_picture._draw.cache_info().misses == 1
    before = text
    trainer.create_model_card()  # what a push does: TRL writes its card anew
    assert BEGIN not in (tmp_path / "README.md").read_text()
    complete_model_card(tmp_path)
    assert section_of(tmp_path) == before.split(BEGIN)[1].split(END)[0]


def test_the_card_is_of_the_adapter_and_not_of_a_plan_beside_it(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    model, plan = adapter_of(tiny_llama())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = section_of(tmp_path)
    plan.replace(layers={name: LayerPlan(8, 2) for name in plan}).save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    complete_model_card(tmp_path)
    assert section_of(tmp_path) == expected
