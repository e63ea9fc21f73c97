"""The report of a search as a reader sees it: in Chromium, from a file, light, dark, narrow and printed.

Of two searches: the demo's, recorded in docs/demo-search.zip by scripts/record_demo.py, and one of a tiny model.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from peft_autoqra.report import write_report
from tests.chromium import chromium, console, needs_chromium, requests, show
from tests.tiny_searcher import tiny_searcher

pytestmark = needs_chromium
DOCS = Path(__file__).parent.parent / "docs"
FIGURES = {"figure-front", "figure-plan", "figure-memory", "figure-timeline", "figure-stages"}
MIN_CONTRAST = 4.5  # WCAG 2, level AA, of text
SHOTS = {  # theme, first section, height in pixels
    "report-light": ("light", None, 1120),
    "report-dark": ("dark", "plan", 1440),
    "report-trials": ("light", "trials", 1330),
}

# Every text with less contrast than it should have, against what is painted below it.
LOW_CONTRAST = """
const channels = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const opaque = colour => { const c = channels(colour); return c.length === 3 || c[3] === 1 ? c : null; };
function ground(element) {
  const box = element.getBoundingClientRect();
  const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  for (const below of stack) {
    if (below === element || below.tagName === 'text') continue;
    const style = getComputedStyle(below);
    const colour = below instanceof SVGElement ? below.tagName === 'path' && style.fill : style.backgroundColor;
    if (colour && colour !== 'none' && opaque(colour)) return opaque(colour);
  }
  return opaque(getComputedStyle(document.body).backgroundColor);
}
document.querySelectorAll('details').forEach(details => details.open = false);
const found = [];
const names = 'h1, h2, h3, p, a, dt, dd, th, td, caption, figcaption, summary, code, svg text';
for (const element of document.querySelectorAll(names)) {
  if (!element.textContent.trim() || element.closest('details:not([open]) > :not(summary)')) continue;
  element.scrollIntoView({block: 'center', inline: 'center'});
  const style = getComputedStyle(element);
  const text = opaque(element instanceof SVGElement ? style.fill : style.color);
  const [high, low] = [luminance(text), luminance(ground(element))].sort((a, b) => b - a);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < arguments[0]) found.push(`${element.textContent.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
}
return found;
"""
FIGURE_BOXES = """
return [...document.querySelectorAll('svg')].map(svg => ({
  name: svg.id, label: svg.getAttribute('aria-label'), role: svg.getAttribute('role'),
  size: [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height],
  texts: [...svg.querySelectorAll('text')].filter(text => text.getBoundingClientRect().width > 0).length,
  hints: [...svg.querySelectorAll('title')].filter(hint => hint.parentNode.getBoundingClientRect().width > 0).length,
  outside: [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect(), frame = svg.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1;
  }).map(text => text.textContent),
}))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("demo"))  # the page shows its directory
        directory = Path("demo-out") / "search-75"
        with zipfile.ZipFile(DOCS / "demo-search.zip") as archive:
            archive.extractall(directory)
        return write_report(directory).absolute()


@pytest.fixture(scope="module")
def tiny_page(tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_searcher(tiny_llama(), folder / "out", granularity="module", max_trials=8).run()
    return write_report(folder / "out")


@pytest.fixture(params=["demo_page", "tiny_page"])
def page(request) -> Path:
    return request.getfixturevalue(request.param)


def test_it_opens_from_a_file_without_errors_or_network(browser: Chrome, page: Path):
    show(browser, page)
    assert console(browser) == []
    assert requests(browser) == {page.as_uri()}
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_every_figure_is_there_and_named(browser: Chrome, page: Path):
    show(browser, page)
    figures = {figure["name"]: figure for figure in browser.execute_script(FIGURE_BOXES)}
    assert figures.keys() == FIGURES
    for figure in figures.values():
        assert figure["role"] == "img"
        assert len(figure["label"]) > 10
        assert min(figure["size"]) > 60
        assert figure["texts"] > 5
        assert figure["hints"] > 2
        assert figure["outside"] == []


def test_nothing_but_figures_and_tables_is_wider_than_a_phone(browser: Chrome, page: Path):
    show(browser, page, width=360)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    scrolling = [box for box in browser.find_elements(By.CLASS_NAME, "scroll") if box.is_displayed()]
    wide = [b for b in scrolling if browser.execute_script("return arguments[0].scrollWidth > 360", b)]
    assert wide
    browser.execute_script("arguments[0].focus()", wide[0])
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)  # without a mouse
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert browser.execute_script("return arguments[0].scrollLeft", wide[0]) > 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_can_be_read(browser: Chrome, page: Path, theme: str):
    show(browser, page, theme=theme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")
    assert browser.execute_script(LOW_CONTRAST, MIN_CONTRAST) == []


def test_it_prints_on_white_whatever_the_theme(browser: Chrome, demo_page: Path):
    show(browser, demo_page, theme="dark", media="print")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script(LOW_CONTRAST, MIN_CONTRAST) == []


@pytest.mark.parametrize("name", SHOTS)
def test_screenshots_of_the_docs(browser: Chrome, demo_page: Path, name: str, pytestconfig: pytest.Config):
    theme, section, height = SHOTS[name]
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    show(browser, demo_page, theme=theme, height=height)
    if section is not None:
        browser.execute_script("document.getElementById(arguments[0]).scrollIntoView()", section)
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    lightness = image.convert("L").resize((1, 1)).getpixel((0, 0))
    assert len(image.getcolors(1 << 22)) > 100  # not blank
    assert (lightness < 128) == (theme == "dark")
    path = DOCS / f"{name}.png"
    if pytestconfig.getoption("write_screenshots"):
        image.save(path, optimize=True)
    assert path.stat().st_size < 300_000
    with Image.open(path) as committed:
        assert committed.size == image.size
    assert f"]({name}.png)" in (DOCS / "report.md").read_text()
