"""docs/kernels.md is what its command writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils import deterministic

from fusedres.triton.kernels_doc import convolutions, passes, registers, table, ways


@pytest.fixture(autouse=True)
def untouched_memory(monkeypatch):
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", False)  # phantoms have none to be filled


def test_the_page_is_current():
    assert (Path(__file__).parents[2] / "docs" / "kernels.md").read_text() == table() + passes() + ways() + registers()


def test_the_convolutions_are_those_of_resnet50():
    found = list(convolutions())
    assert sum(count for *_, count in found) == 52  # 53 with the stem
    weights = sum(channels * filters * kernel**2 * count for _, channels, filters, kernel, _, count in found)
    assert weights == 25_557_032 - 2048 * 1000 - 1000 - 64 * 3 * 49 - 2 * 26_560  # all but fc, stem and norms


def test_the_passes_are_those_of_a_step():
    rows = [line.split(" | ") for line in passes().splitlines() if line.startswith("| ") and "`" in line]
    found = [
        (when.removeprefix("| "), name.strip("`"), float(megabytes), int(n)) for when, name, n, megabytes, *_ in rows
    ]
    image, narrow = 256 * 112 * 112 * 64 * 2 / 1e6, 256 * 56 * 56 * 64 * 2 / 1e6  # the stem's output and the pool's
    for when, name, count, megabytes in (
        ("forward", "convolution", 1, (1 + 3 * 4 / 64) * image),
        ("forward", "bn_stats", 1, image),
        ("forward", "join_pool", 1, image + 1.5 * narrow),  # the result, and a byte for each of its values
        ("backward", "join_pool_backward", 1, image + 1.5 * narrow),
        ("backward", "join_backward_reduce", 1, 2 * image),
        ("backward", "join_backward_apply", 1, 3 * image),
        ("backward", "convolution_backward", 1, (1 + 3 * 4 / 64) * image),
        ("backward", "join_backward_mask", 3, 4 * 4 * narrow),  # g, y, residual; g
        ("inference", "conv_fused_join", 3, (1 + 4 + 4) * narrow),  # with the residual
    ):
        assert any(row[:2] == (when, name) and row[3] == count and abs(row[2] - megabytes) < 0.2 for row in found), name
    assert sum(row[3] for row in found if row[:2] == ("inference", "conv_fused_join")) == 36  # all 1x1
