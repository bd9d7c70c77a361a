"""The figures in ``docs/blocks`` are of the blocks as they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fusedres import nn as blocks

DOCS = Path(__file__).parents[1] / "docs"
_spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
figures = sys.modules["figures"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_up_to_date(name):
    module, width = figures.FIGURES[name]
    drawn = figures.draw(module, width)
    ElementTree.fromstring(drawn)
    assert (DOCS / "blocks" / f"{name}.svg").read_text() == drawn, "run python docs/figures.py"


def test_the_page_shows_every_figure_and_names_every_block():
    page = (DOCS / "architectures.md").read_text()
    assert {path.stem for path in (DOCS / "blocks").iterdir()} == set(figures.FIGURES)
    assert all(f"blocks/{name}.svg" in page for name in figures.FIGURES)
    ours = [c for c in vars(blocks).values() if isinstance(c, type)]
    assert all(f"`{c.__name__}" in page for c in ours)


def test_the_units_that_the_design_counts():
    """A bottleneck keeps 10 where PyTorch keeps 12, a pre-activation one 6 of 12."""
    kept = {}
    for name in ("bottleneck", "preact_bottleneck"):
        module, width = figures.FIGURES[name]
        kept[name] = [w + sum(box.keeps for box in boxes) for _, w, boxes in figures.columns(module, width)]
    assert kept == {"bottleneck": [48, 40], "preact_bottleneck": [48, 24]}
