"""The README.md of a plan's folder."""

from __future__ import annotations

import ast

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan

PLAN = BitRankPlan(
    {"a": LayerPlan(2, 4), "b": LayerPlan(4, 8)},
    base_model=BaseModelInfo(name_or_path="someone/some-model"),
    memory=MemoryEstimate(
        weight_bytes=1000,
        metadata_bytes=20,
        untouched_bytes=300,
        adapter_bytes=4,
        gradient_bytes=4,
        optimizer_bytes=8,
    ),
    provenance={"held_out_loss": 2.71828, "steps": 30, "budget_bytes": 1_500_000, "budget_scope": "training"},
)


def test_card_says_what_the_plan_is_and_how_to_load_it(tmp_path):
    PLAN.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "someone/some-model"
    assert set(card.data.tags) == {"autoqra", "lora", "quantization"}
    for text in ("1 at 2 bits, 1 at 4 bits", "3.00", "6.0", "2.7183 after 30 steps", "1.5 MB (training)", "1,336"):
        assert text in card.text
    code = card.text.split("```python")[1]
    assert code.index("import peft_autoqra") < code.index("from peft import")


def test_card_shows_the_plan_as_a_table_and_a_picture(tmp_path):
    layers = {f"model.layers.{i}.{kind}": LayerPlan(2 + i, 4 * i) for i in range(3) for kind in ("q", "up")}
    PLAN.replace(layers=layers | {"lm_head": LayerPlan(8, 0)}).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    rows = ["| 0 | 2/0 | 2/0 |  |", "| 1 | 3/4 | 3/4 |  |", "| 2 | 4/8 | 4/8 |  |", "| other |  |  | 8/0 |"]
    assert "\n".join(rows) in text
    assert "](autoqra_plan.png)" in text
    Image.open(tmp_path / "autoqra_plan.png").verify()


def test_card_does_not_show_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "autoqra_plan.png").mkdir()
    with pytest.warns(UserWarning, match="cannot be written"):
        PLAN.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "autoqra_plan.png" not in text
    assert "| other | 2/4 | 4/8 |" in text


def test_folder_as_base_model_stays_out_of_the_header(tmp_path):
    PLAN.replace(base_model=BaseModelInfo(name_or_path=str(tmp_path))).save_pretrained(tmp_path)
    header = (tmp_path / "README.md").read_text().split("---")[1]
    assert "base_model" not in yaml.safe_load(header)


def test_names_stay_names_whatever_they_hold(tmp_path):
    name = 'x"); print(1); ("```<!-- \\'
    layers = {"model.layers.0.<img src=x>": LayerPlan(4, 8), "![x](y": LayerPlan(4, 8)}
    provenance = {"origin": "a\n\n<b>|`", "held_out_loss": "low", "budget_bytes": [1]}
    PLAN.replace(layers=layers, base_model=BaseModelInfo(name_or_path=name), provenance=provenance).save_pretrained(
        tmp_path
    )
    text = (tmp_path / "README.md").read_text()
    code = ast.parse(text.split("```python\n")[1].split("\n```\n")[0])
    assert name in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    around = text.split("```python\n")[0]
    assert "<" not in around
    assert "![x]" not in around
    assert r"| found by | a  &lt;b&gt;\|\` |" in around
    assert "held-out loss" not in text
    assert "memory budget |" not in text


def test_card_of_a_bare_plan(tmp_path):
    BitRankPlan({"a": LayerPlan(3, 0)}).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## Memory" not in text
    assert "found by" not in text
    assert "budget" not in text


def test_the_mean_is_said_to_be_of_what_it_is():
    shapes = {"a": (8, 8), "b": (8, 24)}
    rows = [
        "| average bits per module, without metadata | 3.00 |",
        "| average bits per weight, without metadata | 3.50 |",
    ]
    for known, row in zip(({}, shapes), rows, strict=True):
        assert row in PLAN.replace(shapes=known).to_card().render(())


def test_a_searched_plan_was_found_within_a_budget():
    assert "found by `peft-autoqra` within a memory budget" in PLAN.to_card().render(())


@pytest.mark.parametrize(
    "mine", ["mine", "---\ntags:\n- lora\n- autoqra\n---\n\n# My model\n", "# AutoQRA plan for me"]
)
def test_a_readme_of_someone_else_is_kept(tmp_path, mine):
    (tmp_path / "README.md").write_text(mine)
    PLAN.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == mine
    assert not (tmp_path / "autoqra_plan.png").exists()


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    PLAN.save_pretrained(tmp_path / "plan")
    card = tmp_path / "plan" / "README.md"
    shared = card.rename(tmp_path / "blob").read_text()
    card.symlink_to(tmp_path / "blob")
    PLAN.replace(provenance={}).save_pretrained(tmp_path / "plan")
    assert (tmp_path / "blob").read_text() == shared
    assert "held-out loss" not in card.read_text()


def test_the_card_of_an_earlier_plan_is_replaced(tmp_path):
    PLAN.replace(base_model=BaseModelInfo(name_or_path="someone/other-model")).save_pretrained(tmp_path)
    PLAN.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == str(PLAN.generate_model_card())
