"""Build the API reference from the docstrings: static HTML that opens from a file. Run by ``make docs``."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import pdoc

import peft_autoqra

REPOSITORY = Path(__file__).parent.parent
MODULES = (
    "peft_autoqra",
    r"!peft_autoqra\.",  # of its modules only those that follow
    "peft_autoqra.distribution",
    "peft_autoqra.errors",
    "peft_autoqra.evaluation.metric_objective",
    "peft_autoqra.evaluation.objective",
    "peft_autoqra.evaluation.sft",
    "peft_autoqra.executors.executor",
    "peft_autoqra.executors.futures_executor",
    "peft_autoqra.executors.ray_executor",
    "peft_autoqra.export",
    "peft_autoqra.memory",
    "peft_autoqra.memory_callback",
    "peft_autoqra.objective_info",
    "peft_autoqra.portable_trainer",
    "peft_autoqra.quant.compiled_decode",
    "peft_autoqra.report",
    "peft_autoqra.search_callback",
    "peft_autoqra.sharding",
    "peft_autoqra.training",
)


def build(directory: Path) -> None:
    """Write the pages.

    Args:
        directory: made where missing; pages that are there are replaced.
    """
    for name in peft_autoqra.__all__:  # pdoc reads the module's own dictionary, which lacks what is imported lazily
        setattr(peft_autoqra, name, getattr(peft_autoqra, name))
    pdoc.render.configure(
        docformat="google",
        show_source=False,
        footer_text=f"peft-autoqra {version('peft-autoqra')}",
        template_directory=Path(__file__).parent / "api_docs_template",
    )
    pdoc.render.env.filters["to_markdown"] = _to_markdown
    with _own_methods_first(), warnings.catch_warnings():
        # AutoQRAConfig takes over PEFT's fields, whose annotations are names that PEFT's module knows; pdoc shows
        # them as they are written
        warnings.filterwarnings("ignore", r"Error parsing type annotation .* for peft_autoqra\.AutoQRAConfig\.")
        pdoc.pdoc(*MODULES, output_directory=directory)


@contextmanager
def _own_methods_first() -> Iterator[None]:
    """Hide what a class such as ``BitRankPlan(Mapping[str, LayerPlan], ...)`` was derived from literally.

    pdoc (16) looks for members there before it looks in the class, and would show those that the class overrides.
    """
    public = (getattr(peft_autoqra, name) for name in peft_autoqra.__all__)
    generic = {obj: obj.__orig_bases__ for obj in public if "__orig_bases__" in vars(obj)}
    for cls in generic:
        cls.__orig_bases__ = ()
    try:
        yield
    finally:
        for cls, bases in generic.items():
            cls.__orig_bases__ = bases


@jinja2.pass_context
def _to_markdown(context: Any, docstring: str) -> str:
    """As pdoc does it, less the tilde of Sphinx's short references, which pdoc would print."""
    markdown: str = pdoc.render_helpers.to_markdown_with_context(context, docstring.replace(":`~", ":`"))
    return markdown


def main() -> None:
    """Build and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "docs" / "api")
    directory = parser.parse_args().output_dir
    build(directory)
    print(directory / "index.html")


if __name__ == "__main__":
    main()
