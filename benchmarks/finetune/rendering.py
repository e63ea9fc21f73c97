"""README and guide from the records alone: tables between markers, and pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.finetune.config import read_config
from benchmarks.finetune.guide_section import guide_section
from benchmarks.finetune.pictures import Point, differences_picture, fingerprint, memory_picture, points_of
from benchmarks.finetune.readme_section import known_rows, readme_section
from benchmarks.finetune.records import read_records
from benchmarks.finetune.results import Results

RECORDS = Path("benchmarks/results/finetune")
CONFIGS = Path("benchmarks/finetune/configs")
README, GUIDE = Path("README.md"), Path("docs/finetuning-benchmark.md")
README_CONFIG = "smollm2-135m"
_END = "<!-- /finetune-benchmark -->"
_SECTION = re.compile(r"(<!-- finetune-benchmark: [^>]* -->\n).*?(^" + re.escape(_END) + ")", re.DOTALL | re.MULTILINE)


class MarkersLost(ValueError):
    """A file without the place that is written to."""


def render(root: Path) -> dict[Path, str | bytes]:
    """What README, guide and pictures should hold, by path below the root.

    Pictures that show the same points already are left out: other versions of matplotlib make other bytes of them.

    Args:
        root: of the repository.

    Raises:
        ConfigError: records of a configuration that is not there.
        MarkersLost: README or guide has not one pair of markers.
        MixedSettings: records that cannot be compared.
    """
    found = {path.stem: read_results(root, path.stem) for path in sorted((root / RECORDS).glob("*.jsonl"))}
    files: dict[Path, str | bytes] = {}
    pictures: dict[str, list[Path]] = {}
    for name, results in found.items():
        drawn = _pictures(root, results)
        files |= {path: content for path, content in drawn.items() if content is not None}
        pictures[name] = list(drawn)
    shown = found.get(README_CONFIG)
    files[README] = _replaced(root, README, readme_section(shown, next(iter(pictures.get(README_CONFIG, ())), None)))
    files[GUIDE] = _replaced(root, GUIDE, guide_section(list(found.values()), pictures))
    return files


def write_rendered(root: Path) -> None:
    """Write what :func:`render` gives."""
    for path, content in render(root).items():
        data = content if isinstance(content, bytes) else content.encode()
        (root / path).write_bytes(data)


def read_results(root: Path, name: str) -> Results:
    """Records of one configuration.

    Raises:
        ConfigError: there is no such configuration.
    """
    config = read_config(root / CONFIGS / f"{name}.yaml")
    records = [record for record in read_records([root / RECORDS / f"{name}.jsonl"]) if record.run.config == name]
    return Results(config, tuple(records))


def _pictures(root: Path, results: Results) -> dict[Path, bytes | None]:
    """None for those that are there; empty without anything to draw."""
    points, rows = points_of(results), known_rows(results)
    if not points:
        return {}
    in_rows = [point for row in rows for point in points if (point.method, point.budget) == row]
    draws: dict[str, tuple[Callable[[Sequence[Point], Sequence[str]], bytes], Sequence[Point]]] = {
        "memory": (memory_picture, points),
        "differences": (differences_picture, in_rows),
    }
    drawn: dict[Path, bytes | None] = {}
    for kind, (draw, shown) in draws.items():
        path = GUIDE.with_name(f"finetuning-{results.config.name}-{kind}.png")
        is_there = (root / path).exists() and fingerprint(shown).encode() in (root / path).read_bytes()
        drawn[path] = None if is_there else draw(shown, results.tasks)
    return drawn


def _replaced(root: Path, path: Path, section: str) -> str:
    text = (root / path).read_text("utf-8")
    if len(_SECTION.findall(text)) != 1:
        raise MarkersLost(f"{path} needs one line <!-- finetune-benchmark: ... --> and, after it, one {_END}.")
    return _SECTION.sub(lambda match: f"{match[1]}{section}\n{match[2]}", text)
