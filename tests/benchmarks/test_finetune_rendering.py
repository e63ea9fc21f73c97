"""README, guide and pictures from records: those of the repository, and made-up ones."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.finetune.config import ConfigError, read_config
from benchmarks.finetune.figures import MISSING
from benchmarks.finetune.guide_section import guide_section
from benchmarks.finetune.method import Spent
from benchmarks.finetune.readme_section import NOTHING, readme_section
from benchmarks.finetune.records import Record
from benchmarks.finetune.rendering import CONFIGS, GUIDE, README, MarkersLost, read_results, render, write_rendered
from benchmarks.finetune.titles import METHODS, budget_order, budget_title, cell_title, method_title
from tests.benchmarks.synthetic_records import (
    BUDGET,
    CONFIG,
    all_records,
    cell,
    memory,
    record,
    write_config,
    write_records,
)

ROOT = Path(__file__).parents[2]
LESS = "0.75*qlora-4bit-r16"
STORED = "stored:qlora-3bit-r16"
BEFORE = "# A title\n\nBefore.\n\n<!-- finetune-benchmark: some words -->\n"
AFTER = "<!-- /finetune-benchmark -->\n\nAfter.\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    for path in (README, GUIDE):
        (tmp_path / path).write_text(BEFORE + "old text\n" + AFTER)
    write_config(tmp_path)
    return tmp_path


def rendered(root: Path, records: list[Record]) -> tuple[str, str]:
    write_records(root, records)
    write_rendered(root)
    return (root / README).read_text(), (root / GUIDE).read_text()


def sections(root: Path, records: list[Record]) -> tuple[str, str]:
    """What stands between the markers, without pictures."""
    write_records(root, records)
    results = read_results(root, "smollm2-135m")
    return readme_section(results, None), guide_section([results], {})


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows that begin with this text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {first}")
    ]


def number(text: str) -> float:
    """The first one."""
    return float(text.split(" ")[0].replace("\N{MINUS SIGN}", "-"))


def mean_losses(records: list[Record], method: str, task: str, budget: str | None = None) -> np.ndarray:
    """Of the seeds 0, 1 and 2 at the better learning rate."""
    wanted = (method, task, budget, 0.002)
    shown = [r for r in records if (r.run.method, r.run.task, r.run.budget, r.run.learning_rate) == wanted]
    found = {r.run.seed: np.mean(r.test.losses) for r in shown}
    return np.array([found[seed] for seed in (0, 1, 2)])


def test_the_repository_shows_what_its_records_say() -> None:
    """After ``python scripts/benchmark_finetune.py --render``."""
    for path, content in render(ROOT).items():
        found = (ROOT / path).read_bytes() if (ROOT / path).exists() else b""
        assert found == (content if isinstance(content, bytes) else content.encode()), path


def test_nothing_is_said_without_records(root):
    texts = rendered(root, [])
    assert texts == (f"{BEFORE}{NOTHING}\n{AFTER}",) * 2
    assert rendered(root, cell("autoqra", 2.0, budget=BUDGET))[0] == texts[0]  # no baseline, no row
    assert [path.name for path in (root / "docs").iterdir()] == [GUIDE.name]


def test_the_readme_has_losses_gaps_memory_and_accuracy(root):
    records = all_records()
    readme, _ = sections(root, records)
    (ours,) = rows(readme, "this package, QLoRA's memory")
    assert ours[1:3] == ["190.0, 160.0", "4.0, 16"]  # stored: without gradients and optimizer states
    for column, task in ((3, "reviews"), (4, "quartz")):
        own = mean_losses(records, "autoqra", task, BUDGET)
        low, high = (mean_losses(records, method, task) for method in ("qlora-r16", "lora-r16"))
        shown, share = ours[column].split(", ")
        assert number(shown) == pytest.approx(np.median(own - low), abs=6e-4)
        assert float(share.strip("%")) == pytest.approx(100 * np.median((low - own) / (low - high)), abs=0.51)
        (baseline,) = rows(readme, "QLoRA r=16")
        assert baseline[column] == f"0 (loss {np.median(low):.3f})"
    metrics = [np.median([r.test.metric for r in records if (r.run.method, r.run.task) == ("autoqra", task)
                          and r.run.learning_rate == 0.002]) for task in ("reviews", "quartz")]  # fmt: skip
    assert ours[5] == " / ".join(f"{metric:.2f}" for metric in metrics)
    assert ours[6] == "0.50"  # 30 s of 60
    assert not rows(readme, "LoftQ")  # was not run
    (claim,) = rows(readme, "closes at least 80%")
    assert [text.split(" ")[0] for text in claim[1:]] == ["yes", "no"]
    (rival,) = rows(readme, 'better than "sequential')
    assert rival[1:] == ["yes: 4-bit QLoRA", "no: 4-bit QLoRA"]
    said = " ".join(readme.split())
    assert "32 of 32 runs had the bytes that were predicted, part by part; 16 of 16 with a budget kept it." in said
    assert (
        "32 runs, 3 seeds a cell; a CPU, 1 thread a run; Python 3.11.2, torch 2.13.0, peft 0.21.2; 2026-11-22" in said
    )
    assert max(map(len, (line for line in readme.splitlines() if not line.startswith(("|", "!"))))) <= 120


def test_the_readme_has_what_is_stored_too(root):
    records = all_records() + cell("autoqra", 2.57, budget=STORED, memory=memory(230_000_000, 200_000_000))
    records += cell("uniform", 2.9, budget=STORED, memory=memory(220_000_000, 200_000_000))
    readme, _ = sections(root, records)
    (theirs,), (ours,) = (
        rows(readme, f"{name}, stored size of 3-bit QLoRA") for name in ("uniform, calibrated", "this package")
    )
    assert (theirs[1], ours[1]) == ("220.0, 190.0", "230.0, 200.0")
    assert ours[3].startswith("\N{MINUS SIGN}0.0")
    assert ours[4] == MISSING
    assert rows(readme, 'better than "uniform')[0][1:] == ["yes: stored 3-bit QLoRA", MISSING]


def test_what_is_not_there_is_a_dash_and_said_so(root):
    records = [r for r in all_records() if (r.run.method, r.run.task) != ("sequential", "quartz")]
    readme, _ = sections(root, [r for r in records if r.run.seed == 0 or r.run.method != "autoqra"])
    (row,) = rows(readme, "sequential")
    assert row[4] == MISSING
    said = " ".join(readme.split())
    assert f"{MISSING}: no result yet" in said
    assert "one seed only" in said
    (claim,) = rows(readme, "closes at least 80%")
    assert [text.split(" (")[0] for text in claim[1:]] == ["not shown", "not shown"]


def test_no_verdicts_are_explained_where_there_are_none(root):
    readme, _ = sections(root, cell("lora-r16", 2.5) + cell("qlora-r16", 2.6))
    assert not rows(readme, "closes at least")
    assert "leaves no other answer" not in readme
    assert "leaves no other answer" in sections(root, all_records())[0]


def test_the_guide_has_every_cell(root):
    records = all_records() + cell("autoqra", 2.58, budget=LESS, memory=memory(140_000_000, 142_000_000, 3))
    records += cell("uniform", 2.9, budget=STORED, mean_bits=3.0, mean_rank=8.0)
    records.append(record("published", 0.0, budget=BUDGET, status="not applicable", reason="no room"))
    records.append(replace(records[-1], run=replace(records[-1].run, learning_rate=0.002)))
    records = [replace(r, dev=None, test=None, memory=None) if r.status != "completed" else r for r in records]
    records.append(record("qlora-r8", 2.6))
    _, guide = sections(root, records)
    less, *_ = rows(guide, "this package, within 75% of 4-bit QLoRA")
    low, own = mean_losses(records, "qlora-r16", "reviews"), mean_losses(records, "autoqra", "reviews", LESS)
    assert less[1:3] == ["0.002", f"{np.median(own):.3f}"]
    assert number(less[3]) == pytest.approx(np.median(own - low), abs=6e-4)
    assert less[5] == "0.500"
    assert less[-4:] == ["4.00", "16.0", "3", "0"]
    (memory_row,) = [
        row
        for row in rows(guide, "this package, within 75%")
        if row[1] == "reviews" and "." in row[2] and len(row) == 12
    ]
    assert memory_row[2:] == ["50.0", "1.0", "50.0", "9.0", "30.0", "140.0", "140.0", "110.0", "142.0", MISSING]
    assert ["this package", "8 of 12", "+3 (metadata)", "12 of 12"] in rows(guide, "this package")
    assert ["this package, within 4-bit QLoRA", "30", "7", "0.50", "0.50", "60", "1.00"] in rows(
        guide, "this package, within 4-bit QLoRA"
    )
    assert ["QLoRA r=16", "reviews", "3.100", "2.600", "0.002"] in rows(guide, "QLoRA r=16")
    assert rows(guide, "uniform, calibrated, within stored 3-bit QLoRA")
    (rival,) = [
        row
        for row in rows(guide, "reviews")
        if row[1:4] == ["4-bit QLoRA", "this package", method_title("sequential")]
    ]
    theirs = mean_losses(records, "sequential", "reviews", BUDGET)
    difference = mean_losses(records, "autoqra", "reviews", BUDGET) - theirs
    assert number(rival[4]) == pytest.approx(np.median(difference), abs=6e-4)
    assert "- AutoQRA as published, within 4-bit QLoRA on reviews: no room." in guide
    assert "- Not all learning rates tried yet: QLoRA r=8 on reviews." in guide


def test_costs_are_in_units_of_the_baselines_time_on_the_same_task(root):
    records = [r for task, seconds in (("reviews", 40.0), ("quartz", 100.0))
               for r in cell("qlora-r16", 2.6, task=task, train_seconds=seconds)]  # fmt: skip
    for task, seconds in (("reviews", 60.0), ("quartz", 200.0)):
        spent = Spent(seconds=seconds / 2, trials=9, cost=0.75)
        records += cell("autoqra", 2.5, task=task, budget=BUDGET, train_seconds=seconds, spent=spent)
    _, guide = sections(root, records)
    (row,) = [row for row in rows(guide, "this package, within 4-bit QLoRA") if len(row) == 7]
    assert row[1:] == ["65", "9", "0.75", "0.88", "130", "1.75"]  # medians of 30 and 100, of 0.75 and 1, of 1.5 and 2


def test_a_search_of_another_cost_is_ours_where_the_configuration_says_so(root):
    write_config(root, text=CONFIG.replace("autoqra, sequential", "autoqra-cost3, published-cost3"))
    records = [r for task in ("reviews", "quartz") for method, budget, loss in (
        ("qlora-r16", None, 2.6), ("lora-r16", None, 2.5), ("autoqra-cost3", BUDGET, 2.51),
        ("published-cost3", BUDGET, 2.6), ("autoqra", BUDGET, 2.55),
    ) for r in cell(method, loss, task=task, budget=budget)]  # fmt: skip
    readme, guide = sections(root, records)
    assert rows(readme, "this package, cost 3, QLoRA's memory")
    assert not rows(readme, "this package, QLoRA's memory")
    assert [text.split(" ")[0] for text in rows(readme, "closes at least 80%")[0][1:]] == ["yes", "yes"]
    assert rows(readme, 'better than "AutoQRA as published, cost 3"')[0][1:] == ["yes: 4-bit QLoRA"] * 2
    assert "Cost: what a search may spend" in " ".join(readme.split())
    pairs = {tuple(row[2:4]) for row in rows(guide, "reviews") if len(row) == 7}
    ours, costly, published = "this package", "this package, cost 3", "AutoQRA as published, cost 3"
    assert pairs == {(ours, published), (costly, published), (ours, costly)}


def test_ours_is_compared_with_every_cost_of_a_rival(root):
    write_config(root, text=CONFIG.replace("sequential", "published-cost3, published-cost10"))
    found = (("qlora-r16", 2.6, None), ("lora-r16", 2.5, None), ("autoqra", 2.55, BUDGET))
    records = [r for method, loss, budget in found for r in cell(method, loss, budget=budget)]
    records += cell("published-cost3", 2.7, budget=BUDGET) + cell("published-cost10", 2.5, budget=BUDGET)
    readme, _ = sections(root, records)
    assert rows(readme, 'better than "AutoQRA as published, cost 3"')[0][1:] == ["yes: 4-bit QLoRA"]
    assert rows(readme, 'better than "AutoQRA as published, cost 10"')[0][1:] == ["no: 4-bit QLoRA"]
    assert [row[0] for row in rows(readme, "AutoQRA as published")] == [
        "AutoQRA as published, cost 3, QLoRA's memory",
        "AutoQRA as published, cost 10, QLoRA's memory",
    ]


def test_rendering_again_changes_nothing_and_new_records_do(root):
    first = rendered(root, all_records())
    pictures = {path: path.read_bytes() for path in (root / "docs").glob("*.png")}
    assert {path.name for path in pictures} == {
        "finetuning-smollm2-135m-memory.png", "finetuning-smollm2-135m-differences.png",
    }  # fmt: skip
    assert set(render(root)) == {README, GUIDE}
    write_rendered(root)
    assert ((root / README).read_text(), (root / GUIDE).read_text()) == first
    assert first[0].startswith(BEFORE)
    assert first[0].endswith(AFTER)
    second = rendered(root, cell("uniform", 2.7, budget=BUDGET))
    assert second != first
    assert all(path.read_bytes() != before for path, before in pictures.items())
    pictures = {path: path.read_bytes() for path in pictures}
    rendered(root, cell("qlora-r8", 2.7))  # no row of the README
    changed = [path.stem.rpartition("-")[2] for path, before in pictures.items() if path.read_bytes() != before]
    assert changed == ["memory"]
    for path in re.findall(r"\]\(([^)]+)\)", second[0]):
        assert (root / path).exists()
    for path in re.findall(r"\]\(([^)]+)\)", second[1]):
        assert (root / "docs" / path).exists()


def test_configurations_follow_each_other_and_the_readme_has_one(root):
    write_config(root, "other")
    other = [replace(r, run=replace(r.run, config="other")) for r in cell("qlora-r16", 2.0)]
    write_records(root, other, "other")
    write_records(root, all_records())
    files = render(root)
    readme, guide = str(files[README]), str(files[GUIDE])
    assert re.findall("^## (.*)", guide, re.MULTILINE) == ["Results: other", "Results: smollm2-135m"]
    assert "2.0" not in "".join(rows(readme, "QLoRA r=16")[0][2:4])


def test_files_that_cannot_be_written_are_named(root):
    (root / README).write_text("no markers\n")
    with pytest.raises(MarkersLost, match=r"README\.md needs one line"):
        render(root)
    write_records(root, cell("qlora-r16", 2.0), "unknown")
    with pytest.raises(ConfigError, match=r"no configuration .*unknown\.yaml"):
        render(root)


# -------------------------------------------------------------------------------------------------------------- titles
@pytest.mark.parametrize("path", sorted((ROOT / CONFIGS).glob("*.yaml")), ids=lambda path: path.stem)
def test_all_that_is_configured_has_a_title(path):
    for group in read_config(path).groups:
        assert {name.partition("-cost")[0] for name in group.methods} <= METHODS.keys()


@pytest.mark.parametrize(
    ("budget", "title"),
    [
        ("qlora-4bit-r16", "4-bit QLoRA"),
        ("0.75*qlora-4bit-r16", "75% of 4-bit QLoRA"),
        ("qlora-2.5bit-r16", "2.5-bit QLoRA"),
        ("qlora-4bit-r64", "4-bit QLoRA r=64"),
        ("stored:qlora-3bit-r16", "stored 3-bit QLoRA"),
        ("6GB", "6GB"),
    ],
)
def test_budgets_have_titles(budget, title):
    assert budget_title(budget) == title
    assert cell_title("autoqra-cost3", budget) == f"this package, cost 3, within {title}"


def test_budgets_come_from_the_largest_and_stored_ones_last():
    budgets = ["stored:qlora-4bit-r16", "qlora-2.5bit-r16", LESS, "qlora-4bit-r16", None, STORED, "6GB"]
    expected = [None, "qlora-4bit-r16", LESS, "qlora-2.5bit-r16", "6GB", "stored:qlora-4bit-r16", STORED]
    assert sorted(budgets, key=budget_order) == expected
