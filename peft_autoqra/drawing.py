"""A figure that is drawn once, for files (PNG) and for pages (SVG that follows dark and light)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from peft_autoqra import colours
from peft_autoqra.objective_info import ObjectiveInfo

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDTH = 6.4
"""Of a chart, inches."""
SMALL, NORMAL = 7.5, 8.0
"""Sizes of text, points."""

_SCREEN_DOTS, _LEAST_SCREEN_DOTS = 118, 92  # per inch on a page; text would be too small below
_SETTINGS: Mapping[str, Any] = {
    "axes.edgecolor": colours.LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": colours.SOFT,
    "axes.labelsize": SMALL,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": colours.INK,
    "axes.titlelocation": "left",
    "axes.titlesize": NORMAL,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": NORMAL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.labelcolor": colours.SOFT,
    "svg.fonttype": "none",
    "svg.hashsalt": "autoqra",  # the same page each time
    "text.color": colours.INK,
    "text.parse_math": False,
    "xtick.color": colours.LINE,
    "xtick.labelcolor": colours.SOFT,
    "xtick.labelsize": SMALL,
    "ytick.color": colours.LINE,
    "ytick.labelcolor": colours.SOFT,
    "ytick.labelsize": SMALL,
}


class Drawing:
    """A matplotlib figure with hints on its marks. Use it inside of ``with plot_settings():``.

    Args:
        width: inches.
        height: inches.
        title: what it shows, for those who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        """An empty sheet. pyplot is not used: it would hold the figure and choose a window system."""
        # imported at first use: it takes longer than the rest of the package's own modules together
        from matplotlib.figure import Figure  # noqa: PLC0415

        self.title = title
        self.figure = Figure(figsize=(width, height), facecolor=colours.PAGE, edgecolor=colours.PAGE)
        self._hints: dict[str, Sequence[str]] = {}

    def sheet(self) -> Axes:
        """Axes over the whole figure in inches from the upper left corner, with nothing drawn."""
        width, height = self.figure.get_size_inches()
        axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        return axes

    def hint(self, artist: Artist, *texts: str) -> None:
        """Show a text where a mark is pointed at; one for each mark of a collection, in order."""
        artist.set_gid(f"hint{len(self._hints)}")
        self._hints[f"hint{len(self._hints)}"] = texts

    def to_png(self, dots_per_inch: int = 200) -> bytes:
        """On white, not transparent: the picture is the same on a dark page."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

        self.figure.set_dpi(dots_per_inch)
        file = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(file, metadata={"Software": None})  # the same file with any version
        return file.getvalue()

    def to_svg(self, name: str) -> str:
        """To be put into a page that has :func:`~peft_autoqra.colours.stylesheet`.

        Args:
            name: of the figure, unique in its page.
        """
        from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415

        file = io.StringIO()
        FigureCanvasSVG(self.figure).print_svg(file, metadata={"Date": None})
        width, height = self.figure.get_size_inches()
        root = _for_page(ElementTree.fromstring(file.getvalue()), name, self._hints)
        inner = "".join(ElementTree.tostring(child, encoding="unicode") for child in root)
        size = f"width:{width * _SCREEN_DOTS:.0f}px;min-width:{width * _LEAST_SCREEN_DOTS:.0f}px"
        return (
            f'<svg id="figure-{name}" role="img" aria-label="{escape(self.title)}" style="{size}" '
            f'viewBox="0 0 {width * 72:g} {height * 72:g}">{inner}</svg>'
        )


def label_as_figure(axes: Axes, objective: ObjectiveInfo) -> None:
    """Turn axes with losses on y over where greater is better, and label them with the figure that losses are of."""
    if objective.greater_is_better:
        axes.invert_yaxis()
        axes.yaxis.set_major_formatter(lambda loss, _: f"{objective.figure(loss):g}".replace("-", "\N{MINUS SIGN}"))


@contextmanager
def plot_settings() -> Iterator[None]:
    """Our look, whatever style sheet the user has chosen."""
    from matplotlib import style  # noqa: PLC0415

    with style.context(["default", dict(_SETTINGS)]):
        yield


def _for_page(root: ElementTree.Element, name: str, hints: Mapping[str, Sequence[str]]) -> ElementTree.Element:
    """Without what would reach beyond the figure: names, styles of all elements, fixed colours."""
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for mark, text in zip(_marks(element), hints.get(element.get("id", ""), ()), strict=False):
            if text:
                title = ElementTree.Element("title")
                title.text = text
                mark.insert(0, title)
    _rename(root, name)
    return root


def _marks(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """What is drawn, in order; definitions are not."""
    for child in element:
        if child.tag in ("path", "use"):
            yield child
        elif child.tag != "defs":
            yield from _marks(child)


def _rename(root: ElementTree.Element, name: str) -> None:
    """Names that are referred to become the figure's own; others go."""
    used = {e.get("href", "").removeprefix("#") for e in root.iter()}
    used |= {e.get("clip-path", "").removeprefix("url(#").removesuffix(")") for e in root.iter()}
    for element in root.iter():
        if element.get("id") in used:
            element.set("id", f"{name}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        if reference := element.get("href"):
            element.set("href", f"#{name}-{reference.removeprefix('#')}")
        if reference := element.get("clip-path"):
            element.set("clip-path", reference.replace("url(#", f"url(#{name}-"))
        if style := element.get("style"):
            element.set("style", colours.with_references(style))
