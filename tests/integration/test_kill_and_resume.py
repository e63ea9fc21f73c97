"""``kill -9`` of a search, then the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_autoqra import BitRankPlan
from tests.tiny_data import token_dataset, word_tokenizer

SEARCH = """
import sys
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig
from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher

folder, out = sys.argv[1:]
AutoQRASearcher(
    AutoModelForCausalLM.from_pretrained(folder + "/model"),
    train_dataset=load_from_disk(folder + "/train"),
    eval_dataset=load_from_disk(folder + "/dev"),
    processing_class=AutoTokenizer.from_pretrained(folder + "/model"),
    args=SFTConfig(output_dir=out, max_length=16, bf16=False, gradient_checkpointing=False, report_to="none",
                   use_cpu=True, per_device_train_batch_size=2, max_steps=4),
    search_config=AutoQRASearchConfig(rank_choices=[0, 2, 4], max_cost=1000.0, max_trials=14, num_seeds=2,
                                      num_eval_sequences=8, num_calibration_sequences=8, output_dir=out),
    show_progress=False,
).run()
"""


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    token_dataset(seed=0).save_to_disk(tmp_path / "train")
    token_dataset(seed=1).save_to_disk(tmp_path / "dev")
    return tmp_path


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SEARCH, str(folder), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def trials(out: Path) -> list[dict]:
    path = out / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "trial"]


def outcome(record: dict) -> tuple:
    return record["number"], record["origin"], record["plan"], record["fidelity"], record["result"]["loss"]


@pytest.mark.timeout(280)
def test_a_killed_search_goes_on_and_ends_like_an_uninterrupted_one(folder):
    killed, whole = folder / "killed", folder / "whole"
    process = start(folder, killed)
    while len(trials(killed)) < 4:
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = trials(killed)
    assert not (killed / "search_result.json").exists()
    assert start(folder, killed).wait() == 0
    after = trials(killed)
    assert after[: len(before)] == before  # not run again: even their seconds are the old ones
    assert start(folder, whole).wait() == 0
    assert [outcome(record) for record in after] == [outcome(record) for record in trials(whole)]
    assert BitRankPlan.from_pretrained(killed / "plan") == BitRankPlan.from_pretrained(whole / "plan")
