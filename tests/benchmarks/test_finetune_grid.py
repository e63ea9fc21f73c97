"""Which runs a configuration asks for, and what is read from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.finetune.config import Config, ConfigError, Group, read_config
from benchmarks.finetune.grid import best_learning_rate, wanted_runs
from benchmarks.finetune.methods.registry import METHODS
from benchmarks.finetune.records import DamagedRecords, Record, Run, Split, append_record, read_records
from benchmarks.finetune.reproduction import reproduction_lines
from benchmarks.finetune.setting import Recipe
from benchmarks.finetune.tasks import TASKS, SplitSizes

RATES = (1e-3, 2e-3, 4e-3)
CONFIGS = sorted(Path(__file__).parents[2].glob("benchmarks/finetune/configs/*.yaml"))


@dataclass(frozen=True)
class Named:
    name: str
    needs_budget: bool


KNOWN = {"plain": Named("plain", needs_budget=False), "fitted": Named("fitted", needs_budget=True)}


def make_config(*groups: Group) -> Config:
    return Config(
        name="tiny",
        model="model",
        tasks=("a", "b"),
        sizes=SplitSizes(train=1, dev=1, test=1),
        recipe=Recipe(max_steps=1, batch_size=1, max_length=8, learning_rate=2e-3),
        learning_rates=RATES,
        groups=groups,
    )


def make_record(run: Run, dev_loss: float | None) -> Record:
    if dev_loss is None:
        return Record(run=run, status="diverged", digest="d", reason="NaN")
    split = Split(loss=dev_loss, answer_loss=0.5, metric=0.5, losses=(dev_loss, dev_loss), right="10")
    return Record(run=run, status="completed", digest="d", dev=split, test=split)


def test_learning_rates_come_first_and_other_seeds_take_the_best() -> None:
    config = make_config(Group(methods=("plain",), tasks=("a",), seeds=(5, 6, 7)))
    first = wanted_runs(config, KNOWN, [])
    assert [(run.learning_rate, run.seed) for run in first] == [(rate, 5) for rate in RATES]
    records = [make_record(run, loss) for run, loss in zip(first, (3.0, 2.0, 2.5), strict=True)]
    assert wanted_runs(config, KNOWN, records[:2]) == first[2:], "a rate that was not tried may be the best"
    later = wanted_runs(config, KNOWN, records)
    assert [(run.learning_rate, run.seed) for run in later] == [(2e-3, 6), (2e-3, 7)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, {5e-4}),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, {8e-3}),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0, 8e-3: 0.5}, {16e-3}),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0, 8e-3: 0.5, 16e-3: 0.1}, set()),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0, 8e-3: 1.5}, set()),
    ],
)
def test_a_best_rate_at_the_edge_asks_for_one_beyond(losses: dict[float, float], expected: set[float]) -> None:
    config = make_config(Group(methods=("plain",), tasks=("a",), seeds=(0,)))
    records = [
        make_record(Run(config="tiny", task="a", method="plain", budget=None, learning_rate=rate, seed=0), loss)
        for rate, loss in losses.items()
    ]
    assert {run.learning_rate for run in wanted_runs(config, KNOWN, records)} == expected
    best = best_learning_rate(("a", "plain", None), config, records, 0)
    assert best == (None if expected else min(losses, key=lambda rate: losses[rate]))


def test_diverged_rates_are_not_chosen_and_a_cell_where_all_diverge_ends() -> None:
    config = make_config(Group(methods=("plain",), tasks=("a",)))
    runs = wanted_runs(config, KNOWN, [])
    records = [make_record(run, loss) for run, loss in zip(runs, (None, 2.0, None), strict=True)]
    assert best_learning_rate(("a", "plain", None), config, records, 0) == 2e-3
    assert wanted_runs(config, KNOWN, [make_record(run, None) for run in runs]) == []


def test_methods_that_fit_themselves_into_budgets_have_a_cell_for_each() -> None:
    config = make_config(Group(methods=("plain", "fitted"), budgets=("x", "y"), seeds=(0,)))
    cells = {(run.task, run.method, run.budget) for run in wanted_runs(config, KNOWN, [])}
    plain = {(task, "plain", None) for task in "ab"}
    assert cells == plain | {(task, "fitted", budget) for task in "ab" for budget in "xy"}


def test_a_run_of_two_groups_is_wanted_once() -> None:
    group = Group(methods=("plain",), seeds=(0,))
    assert len(wanted_runs(make_config(group, group), KNOWN, [])) == 2 * len(RATES)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = Run(config="tiny", task="a", method="plain", budget=None, learning_rate=1e-3, seed=0)
    records = [make_record(run, 2.0), make_record(run, None)]
    for record in records:
        append_record(tmp_path / "new" / "records.jsonl", record)
    assert read_records([tmp_path / "new" / "records.jsonl", tmp_path / "missing.jsonl"]) == records


def test_a_record_that_was_cut_off_is_none_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    """A process was killed while it wrote, or writes just now."""
    path = tmp_path / "records.jsonl"
    run = Run(config="tiny", task="a", method="plain", budget=None, learning_rate=1e-3, seed=0)
    first, second = make_record(run, 2.0), make_record(run, 1.0)
    append_record(path, first)
    whole = path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        assert read_records([path]) == [first]
        append_record(path, second)
        assert read_records([path]) == [first, second]
    path.write_bytes(whole[:-1])
    assert read_records([path]) == []


@pytest.mark.parametrize("line", ["not JSON", "{}", "null", '{"memory": null, "dev": null, "test": null}'])
def test_damaged_records_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    run = Run(config="tiny", task="a", method="plain", budget=None, learning_rate=1e-3, seed=0)
    text = make_record(run, 2.0).to_json()
    path.write_text(f"{text}\n{line}\n{text}\n", encoding="utf-8")
    with pytest.raises(DamagedRecords, match=r"Line 2 of .*records\.jsonl"):
        read_records([path])


def test_reproductions_are_set_beside_runs_of_the_same_recipe() -> None:
    here = Run(config="smallest", task="a", method="plain", budget=None, learning_rate=1e-3, seed=0)
    there = Run(config="tiny", task="a", method="plain", budget=None, learning_rate=1e-3, seed=0)
    other = Run(config="tiny", task="a", method="plain", budget=None, learning_rate=2e-3, seed=0)
    lines = reproduction_lines([make_record(here, 2.25)], [make_record(there, 2.0), make_record(other, 1.0)])
    assert lines[2:] == ["| a | plain |  | 2.2500 | 2.0000 | +0.2500 |"]
    assert reproduction_lines([make_record(here, 2.25)], [make_record(other, 1.0)]) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_name_what_there_is(path: Path) -> None:
    config = read_config(path)
    assert set(config.tasks) <= TASKS.keys()
    assert {name for group in config.groups for name in group.methods} <= METHODS.keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps", "max_step", "unknown entries .*max_step"),
        ("tasks:", "task:", "unknown entries .*task"),
        ("learning_rates: [1.0e-3, 2.0e-3]", "", "lacks .*learning_rates"),
        ("learning_rates: [1.0e-3, 2.0e-3]", "learning_rates: []", "at least one of learning_rates"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = next(path for path in CONFIGS if path.stem == "smallest").read_text("utf-8")
    assert old in text
    (tmp_path / "wrong.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "wrong.yaml")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_config(tmp_path / "nowhere.yaml")
