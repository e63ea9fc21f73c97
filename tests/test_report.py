"""The report of a search, made from files as a search leaves them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from peft_autoqra.errors import SearchStateError
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan
from peft_autoqra.report import write_report

MEMORY = MemoryEstimate(
    weight_bytes=5000,
    metadata_bytes=300,
    untouched_bytes=700,
    adapter_bytes=400,
    gradient_bytes=400,
    optimizer_bytes=800,
)
PLAN = BitRankPlan(
    {
        f"model.layers.{layer}.{module}": LayerPlan(bits, rank)
        for layer in range(3)
        for module, bits, rank in (("self_attn.q_proj", 2, 0), ("mlp.up_proj", 8, 4), ("mlp.down_proj", 16, 16))
    },
    base_model=BaseModelInfo(name_or_path="someone/some-model"),
    memory=MEMORY,
)


def trial_line(number: int, origin: str, num_steps: int, loss: float | None, error: str | None = None) -> str:
    result = {"status": "completed" if loss else "failed", "loss": loss, "seconds": 2.0, "error": error}
    record = {"number": number, "origin": origin, "fidelity": {"num_steps": num_steps}, "total_bytes": 7000}
    return json.dumps({"kind": "trial", **record, "result": result}) + "\n"


def summary(loss: float, **more) -> dict:
    figures = {"origin": "evolution", "steps": 30, "total_bytes": 7600, "average_bits": 3.5, "average_rank": 7.0}
    figures["seed_losses"] = [loss] * 3
    return {"number": 0, "loss": loss, **figures, **more}


@pytest.fixture
def search_directory(tmp_path) -> Path:
    PLAN.save_pretrained(tmp_path / "plan")
    lines = [json.dumps({"kind": "search", "version": 2, "identity": {"memory_budget": "8kB", "seed": 5}}) + "\n"]
    lines += [trial_line(i, "evolution", 0, 3.0 + i / 100) for i in range(12)]
    lines += [
        trial_line(12, "evolution", 0, 99.0),
        trial_line(13, "allocation:rank>=4", 10, 2.9),
        trial_line(14, "trust_region", 10, None, "ValueError: <script>alert(1)</script>"),
        trial_line(15, "baseline:qlora-4bit", 30, 2.8),
    ]
    (tmp_path / "trials.jsonl").write_text("".join(lines))
    margin = {"mean": -0.1, "standard_error": 0.025, "interval": [-0.15, -0.05], "num_seeds": 3}
    result = {
        "winner": summary(2.7),
        "baselines": {"qlora-4bit": summary(2.8, winner_minus_this=margin)},
        "budget_bytes": 8000,
        "budget_scope": "training",
        "seconds": 93.0,
        "verdict": "Better than the best baseline, qlora-4bit.",
        "cost": 0.9,
        "max_cost": 1.0,
    }
    (tmp_path / "search_result.json").write_text(json.dumps(result))
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: someone/some-model\n")
    return tmp_path


class Page(HTMLParser):
    """Tags with their attributes, and a check that all are closed in order."""

    VOID = ("meta", "br", "img", "link", "line", "rect", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag: str, css_class: str) -> int:
        return sum(name == tag and css_class in (attrs.get("class") or "").split() for name, attrs in self.tags)


def test_page_is_well_formed_and_loads_nothing(search_directory):
    text = write_report(search_directory).read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert re.findall(r"https?://[^\"' ]+", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert "prefers-color-scheme:dark" in text


def test_heat_map_has_a_cell_for_every_module_and_a_dot_for_every_adapter(search_directory):
    text = write_report(search_directory).read_text()
    heat_map = Page(re.search(r"<svg[^>]*Bits and rank.*?</svg>", text).group())
    assert [heat_map.count("rect", f"bits{bits}") for bits in (2, 8, 16)] == [3, 3, 3]
    assert heat_map.count("circle", "dot") == 6
    assert "model.layers.2.mlp.down_proj: 16 bits, rank 16" in text
    radii = {float(attrs["r"]) for tag, attrs in heat_map.tags if tag == "circle"}
    assert max(radii) / min(radii) == pytest.approx(2)  # areas as 16 to 4


def test_comparison_shows_losses_margin_and_both_accounts(search_directory):
    text = write_report(search_directory).read_text()
    for figure in (
        "2.7000",
        "2.8000",
        "-0.1000 [-0.1500, -0.0500]",
        "7.6 kB",
        "6.4 kB",
        "1 min 33 s",
        "8.0 kB (training)",
    ):
        assert figure in text


def test_every_trial_is_marked_or_listed_as_failed(search_directory):
    text = write_report(search_directory).read_text()
    panels = Page(re.search(r"<svg[^>]*Loss of every trial.*?</svg>", text).group())
    stages = ("evolution", "allocation", "trust_region", "baseline")
    assert [sum(panels.count(tag, stage) for tag in ("rect", "circle", "path")) for stage in stages] == [13, 1, 0, 1]
    assert "1 above the top, up to 99.00" in text
    assert "Failed trials" in text


def test_text_from_files_is_escaped(search_directory):
    text = write_report(search_directory).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_reproduction_names_commands_recipe_and_identity(search_directory):
    text = write_report(search_directory).read_text()
    assert f"autoqra search --config {search_directory}/recipe.yaml" in text
    assert "model_name_or_path: someone/some-model" in text
    assert "seed: 5" in text


def test_search_under_way_is_shown_without_touching_its_log(search_directory):
    (search_directory / "search_result.json").unlink()
    log = search_directory / "trials.jsonl"
    log.write_text(log.read_text() + '{"kind": "trial", "numb')
    before = log.read_bytes()
    text = write_report(search_directory).read_text()
    assert "no result yet" in text
    assert log.read_bytes() == before


def test_plan_alone(tmp_path):
    PLAN.replace(memory=None).save_pretrained(tmp_path)
    path = write_report(tmp_path, tmp_path / "pages" / "plan.html")
    text = path.read_text()
    assert "some-model" in text
    assert "Trials" not in text
    assert Page(text).open == []


def test_modules_outside_of_layers_and_several_stacks(tmp_path):
    names = ["encoder.block.0.wi", "decoder.block.0.wi", "score"]
    BitRankPlan({name: LayerPlan(4, 0) for name in names}).save_pretrained(tmp_path)
    text = write_report(tmp_path).read_text()
    assert all(f">{label}<" in text for label in ("encoder 0", "decoder 0", "other", "score"))


@pytest.mark.parametrize("name", ["trials.jsonl", "search_result.json"])
def test_damaged_file_is_named(search_directory, name):
    (search_directory / name).write_text('{"a": \n')
    with pytest.raises(SearchStateError, match=name):
        write_report(search_directory)


def test_directory_without_search_or_plan(tmp_path):
    with pytest.raises(SearchStateError, match="neither"):
        write_report(tmp_path)
    with pytest.raises(SearchStateError, match="no directory"):
        write_report(tmp_path / "nothing")
