"""Which modules the analyses take for blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from fusedres.analysis import blocks_of, depth_network
from fusedres.analysis.networks import KINDS


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("resnet50", 16), ("cifar_resnet", 9)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_blocks_of_a_network(name, count, fused):
    found = blocks_of(getattr(models, name)(fused=fused))
    assert len(found) == count
    assert next(iter(found)) == "layer1.0"


@pytest.mark.parametrize("kind", KINDS)
def test_the_pairs_of_a_plain_network_too(kind):
    assert len(blocks_of(depth_network(kind, 14))) == 6


def test_blocks_of_this_library():
    model = nn.Sequential(fusedres.nn.ResidualBlock(4), nn.ReLU(), fusedres.nn.BottleneckBlock(4, 8))
    assert list(blocks_of(model)) == ["0", "2"]


def test_convolutions_without_a_norm_are_no_block():
    """As the two of a squeeze-excitation gate, inside of a block that is one."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.gate = Gate()

    model = nn.Sequential(Gated(), Gated())
    assert list(blocks_of(model)) == ["0", "1"]


def test_a_model_without_blocks_is_one():
    model = nn.Linear(2, 2)
    assert blocks_of(model) == {"": model}


def test_classes_that_are_asked_for_the_outermost():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1))
    assert list(blocks_of(model, (nn.Linear,))) == ["0.0", "1"]
    assert list(blocks_of(model, (nn.Sequential,))) == [""]
    with pytest.raises(ValueError, match="no Conv2d or ReLU"):
        blocks_of(model, (nn.Conv2d, nn.ReLU))


def test_a_block_that_is_the_whole_model():
    block = fusedres.nn.ResidualBlock(4)
    assert blocks_of(block) == {"": block}
    assert block(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)
