"""Blocks whose input is small run as stock, unless somebody asked for something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import block as block_module
from fusedres import select


@pytest.fixture(autouse=True)
def thresholds(monkeypatch, nothing_too_small) -> None:
    monkeypatch.setitem(select.FEWEST_ELEMENTS, "training", 1000)
    monkeypatch.setitem(select.FEWEST_ELEMENTS, "inference", 500)


@pytest.fixture
def stock_runs(monkeypatch) -> list[torch.Size]:
    """The shapes of the inputs that ran as stock."""
    shapes: list[torch.Size] = []
    stock = block_module._walk

    def spy(block, root, x, residual):
        shapes.append(x.shape)
        return stock(block, root, x, residual)

    monkeypatch.setattr(block_module, "_walk", spy)
    return shapes


def block(memory: str = "auto") -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    assert fusedres.patch(model, memory=memory).coverage == 1.0
    return model


@pytest.mark.parametrize("elements, stock", [(4 * 249, True), (4 * 250, False)])
def test_training(stock_runs, elements, stock):
    block()(torch.randn(1, 4, 1, elements // 4))
    assert bool(stock_runs) is stock


@pytest.mark.parametrize("elements, stock", [(4 * 124, True), (4 * 125, False)])
def test_inference(stock_runs, elements, stock):
    with torch.no_grad():
        block().eval()(torch.randn(1, 4, 1, elements // 4))
    assert bool(stock_runs) is stock


def test_low_memory_and_forced_backends_are_obeyed(stock_runs):
    x = torch.randn(1, 4, 3, 3)
    block(memory="low")(x)
    with fusedres.use_backend("reference"):
        block()(x)
    assert not stock_runs
