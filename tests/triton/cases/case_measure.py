"""Measuring: of a problem every kind finds candidates that agree with the vendor's result, and the best is kept; of a
block, the kernels' numbers are right, and its verdict is their time's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres import select
from fusedres.ops.conv import ConvGeometry
from fusedres.testing import channels_last
from fusedres.triton import tuning
from fusedres.triton.tuning import Entry, Problem, Tiles, Verdict
from fusedres.tune import blocks, measure, measure_block, tune

ONE, THREE = ConvGeometry((1, 1), (0, 0), (1, 1), 1), ConvGeometry((1, 1), (1, 1), (1, 1), 1)
CANDIDATES = [Tiles(64, 32, 32, 4, 2), Tiles(64, 64, 32, 4, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel,g", [((1, 1), ONE), ((3, 3), THREE)], ids=["1x1", "3x3"])
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "pending"])
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_candidates_agree_with_the_vendor(device, monkeypatch, kind, prologue, kernel, g, dtype):
    monkeypatch.setattr(tuning, "space", lambda problem, capability: CANDIDATES)
    times = iter([3.0, 1.0, 2.0, 7.0])  # the heuristic, two candidates, the vendor

    def timer(call):
        call()
        return next(times)

    entry = measure(Problem(kind, dtype, (2, 16, 6, 5), 24, kernel, g, prologue), torch.device(device), timer)
    assert entry == (CANDIDATES[0], 1.0, 7.0)


def test_other_ways_are_tried_on_the_best_tiles(device, monkeypatch):
    """Three base tiles, then the ways of the second, of which the last is fastest; the vendor comes last."""
    ways = [CANDIDATES[0]._replace(descriptors=True), CANDIDATES[0]._replace(descriptors=True, persistent=True)]
    monkeypatch.setattr(tuning, "space", lambda problem, capability: CANDIDATES)
    asked = []
    monkeypatch.setattr(tuning, "variants", lambda problem, tiles, capability: asked.append(tiles) or ways)
    times = iter([3.0, 1.0, 2.0, 1.5, 0.5, 7.0])

    def timer(call):
        call()
        return next(times)

    each = Problem("fprop", torch.bfloat16, (2, 16, 6, 5), 24, (1, 1), ONE, True)
    assert measure(each, torch.device(device), timer) == (ways[1], 0.5, 7.0)
    assert asked == [CANDIDATES[0]]


def test_every_shape_is_tried_before_other_stages_of_the_best(device, monkeypatch):
    shapes = [each._replace(stages=stages) for each in CANDIDATES for stages in (3, 2, 4)]
    monkeypatch.setattr(tuning, "space", lambda problem, capability: shapes)
    monkeypatch.setattr(tuning, "variants", lambda problem, tiles, capability: [])
    times = iter([5.0, 4.0, 3.0, 2.0, 1.0, 7.0])  # the heuristic, the two shapes, stages of the second, the vendor
    each = Problem("fprop", torch.bfloat16, (2, 16, 6, 5), 24, (3, 3), THREE, True)
    entry = measure(each, torch.device(device), lambda call: next(times))
    assert entry == (CANDIDATES[1]._replace(stages=4), 1.0, 7.0)


@pytest.mark.parametrize("room,milliseconds", [(2**20, 1.0), (2**10, 2.0)])
def test_what_asks_for_more_memory_than_there_is_is_not_tried(device, monkeypatch, room, milliseconds):
    monkeypatch.setattr(tuning, "space", lambda problem, capability: CANDIDATES)
    monkeypatch.setattr(tuning, "shared_memory", lambda device: room)
    times = iter([2.0, 1.0, 3.0, 7.0] if room > 2**10 else [2.0, 7.0])
    each = Problem("fprop", torch.bfloat16, (2, 16, 6, 5), 24, (1, 1), ONE, True)
    assert measure(each, torch.device(device), lambda call: next(times)).milliseconds == milliseconds


def test_sums_of_many_terms_are_not_held_to_the_vendors_last_digit(device, monkeypatch):
    """A weight gradient of float32 over 5000 pixels, whose sums no two implementations take in one order."""
    monkeypatch.setattr(tuning, "space", lambda problem, capability: [])
    each = Problem("wgrad", torch.float32, (2, 8, 50, 50), 8, (1, 1), ONE, True)
    assert measure(each, torch.device(device), lambda call: 1.0).milliseconds == 1.0


def test_a_backend_whose_kernel_the_device_refuses_is_not_chosen(device, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def refuses(*_, **__):
        raise OutOfResources(168960, 101376, "shared memory")

    monkeypatch.setattr(select, "_AUTOMATIC", {})
    monkeypatch.setattr(select, "_resolve", select._resolve.__wrapped__)
    block = fusedres.nn.BottleneckBlock(16, 32, 2).to(device)
    case = next(iter(blocks(block, channels_last((2, 16, 8, 6)).to(device)).values()))
    monkeypatch.setattr("fusedres.triton.conv_fused.launch", refuses)
    monkeypatch.setattr("fusedres.triton.join.launch", refuses)
    assert measure_block(case, ["triton"], lambda call: 1.0) == Verdict("stock", 1.0, 1.0, ("triton",))


@pytest.mark.parametrize("ours,expected", [(1.0, "triton"), (2.0, "stock")])
def test_a_blocks_verdict(device, monkeypatch, ours, expected):
    monkeypatch.setattr(select, "_AUTOMATIC", {})
    monkeypatch.setattr(select, "_resolve", select._resolve.__wrapped__)
    block = fusedres.nn.BottleneckBlock(16, 32, 2).to(device)
    cases = blocks(block, channels_last((2, 16, 8, 6)).to(device))
    assert [key.split("_")[0] for key in cases] == ["inference", "training"]
    for case in cases.values():
        times = iter([2.0, ours])

        def timer(call, times=times):
            call()
            return next(times)

        assert measure_block(case, ["triton"], timer) == Verdict(expected, ours, 2.0)


def test_a_budget_keeps_what_was_measured_until_then(device, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys.modules["fusedres.tune"], "measure", lambda problem, *_: Entry(CANDIDATES[0], 1.0, 7.0))
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1), torch.nn.Conv2d(16, 32, 3, padding=1)).to(device)
    x = torch.randn(2, 8, 6, 6, device=device)
    report = tune(model, x, seconds=0.0)
    (key,) = report.entries
    assert "_k32_3x3_" in key, "what computes most comes first"
    assert report.left == 9 and "9 more were not measured" in str(report)
    assert list(json.loads(Path(report.path).read_text())["entries"]) == [key]
    assert tune(model, x).left == 0
