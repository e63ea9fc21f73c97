"""The picture of a plan, seen as pixels."""

from __future__ import annotations

import ast
import io
from collections import Counter
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from peft_autoqra import plan_picture
from peft_autoqra.plan import LayerPlan
from peft_autoqra.plan_picture import draw_plan

KINDS = ("q_proj", "k_proj", "v_proj")


def uniform(bits: int, rank: int = 0, num_layers: int = 4) -> dict[str, LayerPlan]:
    return {f"model.layers.{i}.{kind}": LayerPlan(bits, rank) for i in range(num_layers) for kind in KINDS}


def pixels(layers: dict[str, LayerPlan]) -> np.ndarray:
    """``[height, width, 3]``."""
    image = Image.open(io.BytesIO(draw_plan(layers)))
    image.load()
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def main_colour(layers: dict[str, LayerPlan]) -> tuple[int, ...]:
    """The most frequent one but the white of the paper."""
    counts = Counter(map(tuple, pixels(layers).reshape(-1, 3)))
    del counts[255, 255, 255]
    return counts.most_common(1)[0][0]


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_more_bits_are_darker_by_a_step_that_needs_no_colour_vision():
    brightness = [luminance(main_colour(uniform(bits))) + 0.05 for bits in (2, 3, 4, 8, 16)]
    assert all(lighter / darker > 1.35 for lighter, darker in pairwise(brightness))


def test_a_change_of_one_module_shows_in_its_cell_alone():
    """The cell's place follows from the order of layers and types, found by two changes elsewhere."""
    base = uniform(2) | {"lm_head": LayerPlan(16, 0)}

    def changed(name: str) -> tuple[float, float]:
        difference = np.abs(pixels(base) - pixels(base | {name: LayerPlan(16, 0)})).sum(axis=2)
        rows, columns = np.nonzero(difference)
        assert (np.ptp(rows), np.ptp(columns)) < (30, 80)
        found = pixels(base | {name: LayerPlan(16, 0)})[int(rows.mean()), int(columns.mean())]
        assert tuple(found) == main_colour(uniform(16))
        return rows.mean(), columns.mean()

    corner, right, below = (changed(f"model.layers.{name}") for name in ("0.q_proj", "0.k_proj", "1.q_proj"))
    width, height = right[1] - corner[1], below[0] - corner[0]
    assert width > 20
    assert height > 10
    assert changed("model.layers.3.v_proj") == pytest.approx((corner[0] + 3 * height, corner[1] + 2 * width), abs=1)


def test_the_area_of_a_dot_grows_with_the_rank():
    sizes = []
    for rank in (0, 4, 16, 64):
        layers = uniform(8) | {"model.layers.0.q_proj": LayerPlan(8, 64), "model.layers.3.v_proj": LayerPlan(8, rank)}
        above_legend = pixels(layers)[:130]
        sizes.append(int((above_legend == main_colour(uniform(8))).all(axis=2).sum()))
    covered = [sizes[0] - size for size in sizes[1:]]
    assert covered[0] > 0
    assert 1.5 < covered[1] / covered[0] < 6
    assert 2.5 < covered[2] / covered[1] < 6


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.$x^2$.q", "model.layers.0.a_b", "lm_head"],
        [f"layers.{i}.experts.{e}.w" for i in range(3) for e in range(20)],
        [f"layers.{i}.q" for i in range(120)],
        ["a"],
        ["層.0.重み", "층.1.무게"],  # escaped: the font has no such letters
    ],
)
def test_names_and_sizes_of_all_kinds(names):
    picture = pixels({name: LayerPlan(4, 8) for name in names})
    assert min(picture.shape[:2]) > 50


@pytest.mark.parametrize("names", [[f"l.0.e.{e}.w" for e in range(41)], [f"l.{i}.w" for i in range(257)]])
def test_no_picture_of_what_would_not_be_legible(names):
    assert draw_plan({name: LayerPlan(4, 8) for name in names}) is None


def test_a_style_sheet_of_the_user_changes_nothing(monkeypatch):
    layers = uniform(3, 5)
    before = draw_plan(layers)
    plan_picture._draw.cache_clear()
    with mpl.rc_context({"figure.dpi": 30, "font.size": 30, "text.usetex": True, "savefig.transparent": True}):
        assert draw_plan(layers) == before


def test_matplotlib_is_imported_at_first_use_only():
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for path in Path(plan_picture.__file__).parent.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert "peft_autoqra.plan_grid" in imported
    assert not [name for name in imported if name.startswith("matplotlib")]
