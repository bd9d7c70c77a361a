"""docs/kernels.md is what its command writes."""

from __future__ import annotations

from pathlib import Path

from fusedres.triton.kernels_doc import _convolutions, table, ways


def test_the_page_is_current():
    assert (Path(__file__).parents[2] / "docs" / "kernels.md").read_text() == table() + ways()


def test_the_convolutions_are_those_of_resnet50():
    found = list(_convolutions())
    assert sum(count for *_, count in found) == 52  # 53 with the stem
    weights = sum(channels * filters * kernel**2 * count for _, channels, filters, kernel, _, count in found)
    assert weights == 25_557_032 - 2048 * 1000 - 1000 - 64 * 3 * 49 - 2 * 26_560  # all but fc, stem and norms
