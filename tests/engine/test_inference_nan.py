"""When inference looks through its input for NaN, and when that costs more than fusing gains."""

from __future__ import annotations

import pytest
import torch
from described import Described, fuse
from torch import nn

from fusedres.engine import inference
from fusedres.select import kernels
from fusedres.testing import channels_last, compare


def strided(groups: int, *behind: str) -> Described:
    return Described([nn.Conv2d(16, 16, 3, 2, 1, groups=groups, bias=False), nn.BatchNorm2d(16), *behind]).eval()


@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 3, 4, 4)])
@pytest.mark.parametrize("behind", [(), ("relu",), ("hardswish",)], ids=["nothing", "relu", "hardswish"])
@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
def test_nan_travels_as_in_stock(groups, behind, where):
    block, x = strided(groups, *behind), channels_last((2, 16, 12, 12))
    x[where] = float("nan")
    found = []
    for fuses in (False, True):
        block.fuses = fuses
        with torch.no_grad():
            found.append(block(x))
    assert found[0].isnan().any()
    assert torch.equal(found[0].isnan(), found[1].isnan())


def test_where_nothing_is_activated_nothing_is_looked_through(monkeypatch):
    monkeypatch.setattr(inference, "swallows", lambda *_: pytest.fail("looked through"))
    compare(strided(1), fuse, lambda seed: [channels_last((2, 16, 12, 12), seed=seed)]).check()


@pytest.mark.parametrize(("groups", "is_stock"), [(1, False), (16, True)])
def test_a_depthwise_convolution_that_shrinks_its_input_runs_as_stock(groups, is_stock, monkeypatch):
    calls = []
    stock = inference.execute_stock
    monkeypatch.setattr(inference, "execute_stock", lambda *a: calls.append(1) or stock(*a))
    block, x = strided(groups, "relu"), channels_last((2, 16, 12, 12))
    block.fuses = True
    with torch.no_grad():
        block(x)
        assert bool(calls) == (is_stock and inference.asks_for_nan(kernels("cpu", x.dtype), x.dtype, x))
        calls.clear()
        block(x.contiguous())
    assert not calls
