"""The report of a search, made from files as a search leaves them."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from peft_autoqra.errors import SearchStateError
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.plan import BaseModelInfo, BitRankPlan, LayerPlan
from peft_autoqra.report import write_report
from peft_autoqra.report_data import read_report_data
from peft_autoqra.sealed_record import sealed

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


def trial_line(number: int, origin: str, num_steps: int, loss: float | None, **more) -> str:
    losses = [] if loss is None else [loss - 0.1, loss + 0.1, loss + 0.02 * (number % 3), loss - 0.02 * (number % 3)]
    result = {"status": "failed" if loss is None else "completed", "loss": loss, "sequence_losses": losses}
    result |= {"seconds": 2.0, "error": more.pop("error", None)}
    fidelity = {"num_steps": num_steps, "seed": more.pop("seed", 0), "learning_rate_factor": 1.0}
    record = {"number": number, "origin": origin, "fidelity": fidelity, "total_bytes": 7000 + number, "cost": 0.01}
    return json.dumps({"kind": "trial", **record, "result": result, "told_at": 1000.0 + 2 * number, **more}) + "\n"


def summary(number: int, loss: float, **more) -> dict:
    figures = {"origin": "evolution", "steps": 30, "total_bytes": 7600, "average_bits": 3.5, "average_rank": 7.0}
    figures["seed_losses"] = [loss] * 3
    return {"number": number, "loss": loss, **figures, **more}


def point(name: str | None, total_bytes: int, difference: float) -> dict:
    interval = [difference - 0.05, difference + 0.05]
    numbers = {"total_bytes": total_bytes, "loss": 2.7 + difference, "difference": difference, "num_seeds": 3}
    return {**numbers, "interval": interval, "stage": "evolution", "name": name}


@pytest.fixture
def search_directory(tmp_path) -> Path:
    PLAN.save_pretrained(tmp_path / "plan")
    lines = [json.dumps({"kind": "search", "version": 2, "identity": {"memory_budget": "8kB", "seed": 5}}) + "\n"]
    lines += [trial_line(i, "evolution", 0, 3.0 + i / 100) for i in range(12)]
    lines += [
        trial_line(12, "evolution", 0, 99.0),
        trial_line(13, "baseline", 30, 2.9),
        trial_line(14, "trust_region", 30, None, error="ValueError: <script>alert(1)</script>"),
        trial_line(15, "baseline:qlora-4bit", 30, 2.8),
        trial_line(16, "trust_region", 30, 2.7),
        trial_line(17, "confirmation", 30, 2.75, seed=1),
    ]
    (tmp_path / "trials.jsonl").write_text("".join(lines))
    margin = {"mean": -0.1, "standard_error": 0.025, "interval": [-0.15, -0.05], "num_seeds": 3}
    result = {
        "winner": summary(16, 2.7, memory=MEMORY.to_dict()),
        "baselines": {"qlora-4bit": summary(15, 2.8, winner_minus_this=margin, memory=MEMORY.to_dict())},
        "best_searched": summary(16, 2.7),
        "points": [point("best searched (winner)", 7600, 0.0), point("qlora-4bit", 7800, 0.1), point(None, 7700, 0.3)],
        "budget_bytes": 8000,
        "budget_scope": "training",
        "seconds": 93.0,
        "verdict": "Better than the best baseline, qlora-4bit.",
        "cost": 0.9,
        "max_cost": 1.0,
        "surrogate_checks": [],
    }
    (tmp_path / "search_result.json").write_text(json.dumps(result))
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: someone/some-model\n")
    return tmp_path


class Page(HTMLParser):
    """Tags with their attributes, and a check that all are closed in order."""

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


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def hints(text: str, name: str) -> list[str]:
    return re.findall("<title>(.*?)</title>", re.search(rf'<svg id="figure-{name}".*?</svg>', text, re.DOTALL).group())


def test_page_is_well_formed_and_loads_nothing(search_directory):
    text = write_report(search_directory).read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert re.findall(r"https?://[^\"' ]+", text) == []
    assert "prefers-color-scheme:dark" in text
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(names) == len(set(names))
    used = {link for _, attrs in page.tags for key, link in attrs.items() if key == "href"}
    assert used <= {f"#{name}" for name in names}


def test_figures_follow_dark_and_light(search_directory):
    """No colour of their own but through the style sheet, which has a dark value for each."""
    text = write_report(search_directory).read_text()
    figures = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    used = set(re.findall(r"var\((--c-[0-9a-f]+)\)", figures))
    assert len(used) > 10
    light, dark = re.findall(r":root\{(--c-.*?)\}", text)
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)
    assert re.findall(r"#[0-9a-f]{6}\b", figures) == []


def test_every_figure_and_table_is_a_file_too(search_directory):
    page = write_report(search_directory, search_directory / "pages" / "found.html")
    text, folder = page.read_text(), page.parent / "found"
    figures = {attrs["id"].removeprefix("figure-") for tag, attrs in Page(text).tags if tag == "svg"}
    assert figures == {"front", "plan", "memory", "timeline", "stages"}
    for name in figures:
        image = Image.open(folder / f"{name}.png").convert("RGB")
        assert min(image.size) > 150
        assert len(image.getcolors(1 << 20)) > 20  # not blank
    modules = rows_of(folder / "modules.csv")
    assert {row["module"]: (int(row["bits"]), int(row["rank"])) for row in modules} == {
        name: (layer.bits, layer.rank) for name, layer in PLAN.items()
    }
    trials = rows_of(folder / "trials.csv")
    assert [row["loss_nats_per_token"] for row in trials[12:15]] == ["99.0", "2.9", ""]
    assert [float(row["end_seconds"]) for row in trials] == [2.0 + 2 * i for i in range(18)]
    parts = {row["part"]: row for row in rows_of(folder / "memory.csv")}
    assert parts["training"]["qlora-4bit_bytes"] == str(MEMORY.total_bytes)
    assert {path.stem for path in folder.glob("*.csv")} == {
        *("plans", "modules", "memory", "fidelities", "trials", "stages", "failed")
    }
    assert not list(page.parent.rglob("*.partial"))


def test_heat_map_has_a_cell_for_every_module_and_a_dot_for_every_adapter(search_directory):
    text = write_report(search_directory).read_text()
    found = hints(text, "plan")
    assert len(found) == 9 + 6
    assert found.count("model.layers.2.mlp.down_proj: 16 bits, rank 16") == 2  # the cell and its dot
    assert found.count("model.layers.0.self_attn.q_proj: 2 bits, no adapter") == 1


def test_front_names_plans_with_their_intervals(search_directory):
    found = hints(write_report(search_directory).read_text(), "front")
    assert len(found) == 3
    assert any(hint.startswith("qlora-4bit: 7.8 kB") and "+0.0500 to +0.1500" in hint for hint in found)


def test_comparison_shows_losses_margin_and_both_accounts(search_directory):
    text = write_report(search_directory).read_text()
    for shown in ("2.7000", "2.8000", "−0.1000", "−0.1500", "7.6 kB", "6.4 kB", "1 min 33 s", "8.0 kB (training)"):  # noqa: RUF001
        assert shown in text
    assert "best searched (winner)" in text


def test_every_trial_is_marked_counted_or_listed_as_failed(search_directory):
    text = write_report(search_directory).read_text()
    found = hints(text, "timeline")
    stages = [re.match(r"trial \d+, (\w+)", hint)[1] for hint in found]
    assert [stages.count(stage) for stage in ("evolution", "baseline", "trust", "confirmation")] == [12, 2, 1, 1]
    assert "1 worse, up to 99.00, not drawn" in text
    assert "Failed trials" in text


def test_gains_are_those_of_the_last_fidelity_over_the_stages_before(search_directory):
    page = write_report(search_directory)
    rows = {row["stage"]: row for row in rows_of(page.with_suffix("") / "stages.csv")}
    assert list(rows) == ["calibration", "evolution", "baseline", "trust region", "confirmation"]
    assert [rows[stage]["num_trials"] for stage in rows] == ["0", "13", "2", "2", "1"]
    assert float(rows["trust region"]["won_nats_per_token"]) == pytest.approx(2.8 - 2.7)
    low, high = (float(rows["trust region"][bound]) for bound in ("interval_low", "interval_high"))
    assert low < 0.1 < high
    assert {rows[stage]["won_nats_per_token"] for stage in rows if stage != "trust region"} == {""}
    assert sum(float(row["cost_full_fine_tunes"]) for row in rows.values()) == pytest.approx(0.9)
    assert sum(float(row["seconds"]) for row in rows.values()) == pytest.approx(93)


def test_a_break_between_a_stop_and_going_on_is_left_out(search_directory):
    log = search_directory / "trials.jsonl"
    log.write_text(log.read_text() + trial_line(18, "evolution", 30, 2.6, told_at=90_000.0))
    trials = read_report_data(search_directory).trials
    assert trials[-1].end_seconds - trials[-2].end_seconds == pytest.approx(2.0)


def test_trials_side_by_side_overlap(search_directory):
    lines = [trial_line(i, "evolution", 30, 3.0, told_at=1000.0 + i % 2) for i in range(4)]
    log = search_directory / "trials.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n" + "".join(lines))
    assert [trial.end_seconds for trial in read_report_data(search_directory).trials] == [2.0, 3.0, 2.0, 3.0]


def test_text_from_files_is_escaped(search_directory):
    text = write_report(search_directory).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_reproduction_names_commands_recipe_and_identity(search_directory):
    text = write_report(search_directory).read_text()
    assert f"autoqra search --config {search_directory}/recipe.yaml" in text
    assert "model_name_or_path: someone/some-model" in text
    assert "seed: 5" in text


def for_accuracy(directory: Path, objective: dict | None = None) -> dict:
    """As if the search had been for an accuracy, whose losses are negative; returns its result."""
    log = directory / "trials.jsonl"
    header, *records = map(json.loads, log.read_text().splitlines())
    header["identity"]["objective"] = "accuracy 0123"
    for record in records:
        loss = record["result"]["loss"]
        if loss is not None:
            accuracy = 1 / loss
            values = [-accuracy - 0.1, -accuracy + 0.1]
            metrics = {"held_out_loss": loss, "accuracy": accuracy}
            record["result"] |= {"loss": -accuracy, "sequence_losses": values, "metrics": metrics}
    log.write_text("".join(json.dumps(record) + "\n" for record in (header, *records)))
    path = directory / "search_result.json"
    result = json.loads(path.read_text())
    for summary in (result["winner"], result["best_searched"], *result["baselines"].values()):
        summary |= {"held_out_loss": summary["loss"], "loss": -1 / summary["loss"]}
    for each in result["points"]:
        each["loss"] = -1 / each["loss"]
    result["objective"] = {"name": "accuracy", "greater_is_better": True, "unit": ""} | (objective or {})
    path.write_text(json.dumps(result))
    return result


def test_another_objective_is_named_and_shown_by_its_value(search_directory):
    for_accuracy(search_directory)
    page = write_report(search_directory)
    text, folder = page.read_text(), page.with_suffix("")
    assert "Accuracy and memory" in text
    assert "accuracy minus the winner's" in text
    assert "Higher is better" in text
    assert "above 0 favours the winner" in text
    assert re.findall(r">([^<]*(?:loss|nats)[^<]*)<", text.split('id="do-it-again"')[0]) == [
        "held-out loss, nats per token"
    ]
    (hint,) = (hint for hint in hints(text, "front") if hint.startswith("qlora-4bit"))
    assert hint.endswith("accuracy 0.3571, minus the winner's -0.1000, 95% interval -0.1500 to -0.0500")
    assert any("accuracy 0.3704" in hint for hint in hints(text, "timeline"))
    assert "best 0.3704" in text
    (winner, other) = rows_of(folder / "plans.csv")
    assert float(winner["accuracy"]) == pytest.approx(1 / 2.7)
    assert float(winner["loss_nats_per_token"]) == 2.7
    assert [float(other[name]) for name in ("winner_minus_this", "interval_low", "interval_high")] == [0.1, 0.05, 0.15]
    stages = {row["stage"]: row for row in rows_of(folder / "stages.csv")}
    assert float(stages["trust region"]["won_accuracy"]) == pytest.approx(1 / 2.7 - 1 / 2.8)
    assert float(rows_of(folder / "fidelities.csv")[1]["best_accuracy"]) == pytest.approx(1 / 2.7)
    assert float(rows_of(folder / "trials.csv")[16]["accuracy"]) == pytest.approx(1 / 2.7)


def test_a_search_under_way_knows_its_objective_from_its_trials(search_directory):
    for_accuracy(search_directory)
    (search_directory / "search_result.json").unlink()
    page = write_report(search_directory)
    assert "accuracy 0.3704" in page.read_text()
    assert float(rows_of(page.with_suffix("") / "trials.csv")[16]["accuracy"]) == pytest.approx(1 / 2.7)
    assert read_report_data(search_directory).objective.greater_is_better


def test_names_of_objectives_are_text(search_directory):
    for_accuracy(search_directory, {"name": "<b>$x^2$ {F1} \u4e2d\n", "unit": "&"})
    text = write_report(search_directory).read_text()
    assert "<b>" not in text
    assert Page(text).open == []
    assert "&lt;b&gt;$x^2$ {F1} \\u4e2d" in text


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


def test_a_searched_plan_alone_shows_its_front_and_budget(tmp_path):
    record = {"budget_bytes": 8000, "budget_scope": "stored", "points": [point("winner", 7600, 0.0)]}
    PLAN.replace(provenance=record).save_pretrained(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "8.0 kB (stored)" in text
    assert len(hints(text, "front")) == 1
    PLAN.replace(provenance={"budget_bytes": 8000, "points": 3}).save_pretrained(tmp_path)  # a stranger's
    assert 'id="figure-front"' not in write_report(tmp_path).read_text()


def test_modules_outside_of_layers_and_several_stacks(tmp_path):
    names = ["encoder.block.0.wi", "decoder.block.0.wi", "score"]
    BitRankPlan({name: LayerPlan(4, 0) for name in names}).save_pretrained(tmp_path)
    text = write_report(tmp_path).read_text()
    assert all(f">{label}<" in text for label in ("encoder 0", "decoder 0", "other", "score"))


def test_a_plan_of_too_many_modules_has_a_table_alone(tmp_path):
    BitRankPlan({f"layers.0.experts.{i}.w": LayerPlan(4, 0) for i in range(41)}).save_pretrained(tmp_path)
    page = write_report(tmp_path)
    assert 'id="figure-plan"' not in page.read_text()
    assert (tmp_path / "report" / "modules.csv").read_text().count("\n") == 42


def test_output_may_be_a_folder_or_a_name_without_suffix(search_directory, tmp_path_factory):
    there = tmp_path_factory.mktemp("there")
    assert write_report(search_directory, there) == there / "report.html"
    assert write_report(search_directory, there / "found") == there / "found.html"
    assert {path.name for path in there.iterdir()} == {"report.html", "report", "found.html", "found"}


@pytest.mark.parametrize("name", ["trials.jsonl", "search_result.json"])
def test_damaged_file_is_named(search_directory, name):
    (search_directory / name).write_text('{"a": \n')
    with pytest.raises(SearchStateError, match=name):
        write_report(search_directory)


@pytest.mark.parametrize("content", ["{}", "3", '{"winner": 1}', '{"winner": {"memory": {"x": 1}}, "baselines": {}}'])
def test_a_result_of_something_else_is_damaged_too(search_directory, content):
    (search_directory / "search_result.json").write_text(content)
    with pytest.raises(SearchStateError, match=r"search_result.json is damaged .* run the search again"):
        write_report(search_directory)


def test_a_recipe_in_another_encoding_is_shown_as_far_as_it_goes(search_directory):
    (search_directory / "recipe.yaml").write_bytes(b"run_name: caf\xe9\n")
    assert "run_name: caf\N{REPLACEMENT CHARACTER}" in write_report(search_directory).read_text()


def test_directory_without_search_or_plan(tmp_path):
    with pytest.raises(SearchStateError, match="neither"):
        write_report(tmp_path)
    with pytest.raises(SearchStateError, match="no directory"):
        write_report(tmp_path / "nothing")


def test_a_changed_figure_of_the_result_is_noticed(search_directory):
    path = search_directory / "search_result.json"
    result = sealed(json.loads(path.read_text()))
    path.write_text(json.dumps(result))
    write_report(search_directory)
    path.write_text(json.dumps({**result, "cost": result["cost"] / 2}))
    with pytest.raises(SearchStateError, match=r"search_result.json is damaged .*wrong checksum"):
        write_report(search_directory)
