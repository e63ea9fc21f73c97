"""The script, as it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.search.comparison import read_curves
from tests.benchmarks.recorded_table import write_table

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_search.py"


@pytest.mark.slow
def test_runs_what_is_not_recorded_and_keeps_the_rest(tmp_path):
    (tmp_path / "trials").mkdir()
    write_table(tmp_path / "trials")

    def run(*methods):
        options = [
            "--parts",
            "synthetic",
            "--landscapes",
            "additive",
            "real-3bit",
            "--seeds",
            "2",
            "--budget",
            "3",
            "--ours",
            "allocation",
        ]
        folders = ["--output_dir", tmp_path, "--trials_dir", tmp_path / "trials"]
        command = [sys.executable, SCRIPT, *options, *folders, "--methods", *methods]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "1/4" in run("allocation")
    output = run("allocation", "random")
    assert "1/4" in output  # two seeds of random on two landscapes
    assert "| allocation minus | additive | real-3bit |" in output
    assert len(read_curves(tmp_path / "search" / "runs.jsonl")) == 8
    assert {path.name for path in (tmp_path / "search").iterdir()} == {"runs.jsonl", "summary.json", "regret.png"}
