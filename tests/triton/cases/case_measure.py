"""Measuring: of a problem every kind finds candidates that agree with the vendor's result, and the best is kept; of a
block, the kernels' numbers are right, and its verdict is their time's."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres import select
from fusedres.ops.conv import ConvGeometry
from fusedres.testing import channels_last
from fusedres.triton import tuning
from fusedres.triton.tuning import Problem, Tiles, Verdict
from fusedres.tune import blocks, measure, measure_block

ONE, THREE = ConvGeometry((1, 1), (0, 0), (1, 1), 1), ConvGeometry((1, 1), (1, 1), (1, 1), 1)
CANDIDATES = [Tiles(64, 32, 32, 4, 2), Tiles(64, 64, 32, 4, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel,g", [((1, 1), ONE), ((3, 3), THREE)], ids=["1x1", "3x3"])
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_candidates_agree_with_the_vendor(device, monkeypatch, kind, kernel, g, dtype):
    monkeypatch.setattr(tuning, "space", lambda problem, capability: CANDIDATES)
    times = iter([3.0, 1.0, 2.0, 7.0])  # the heuristic, two candidates, the vendor

    def timer(call):
        call()
        return next(times)

    entry = measure(Problem(kind, dtype, (2, 16, 6, 5), 24, kernel, g, True), torch.device(device), timer)
    assert entry == (CANDIDATES[0], 1.0, 7.0)


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
