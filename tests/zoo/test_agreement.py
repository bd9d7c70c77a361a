"""The comparison of a patched network with its stock copy: that it agrees, and that it sees what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusedres.patch import patch
from fusedres.zoo.agreement import agreement, fitting_input


class Network(nn.Module):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head, self.size = nn.Dropout(0.5), nn.Linear(8, 3), size

    def forward(self, x):
        if x.shape[2] < self.size:
            raise ValueError("too small")
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return {"features": x, "logits": [self.head(self.drop(x.mean((2, 3))))], "labels": x.argmax(1)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.network(x)


def test_agrees():
    found = agreement(Block())
    assert found.ok
    assert found.report.coverage == 1.0


def scale(model: nn.Module) -> None:
    model.network[0].weight.data.mul_(1 + 1e-5)


def statistics(model: nn.Module) -> None:
    model.network[1].momentum = 0.2


def nothing_in_training(model: nn.Module) -> None:
    model.network[0].weight.requires_grad_(False)


def not_a_number(model: nn.Module) -> None:
    model.network[1].bias.data[0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (scale, "output in inference"),
        (statistics, "buffer network.1.running_mean"),
        (nothing_in_training, "gradient of network.0.weight"),
        (not_a_number, "output in inference"),
    ],
)
def test_sees_what_is_wrong(spoil, where):
    def fuse(model):
        report = patch(model)
        spoil(model)
        return report

    found = agreement(Block(), fuse=fuse)
    assert not found.ok
    assert any(name.startswith(where) for name, _ in found.differences), found.differences


def test_results_of_any_structure_and_dropout():
    found = agreement(Network())
    assert found.report.fused == () or found.ok  # its forward branches on the size
    assert found.unproven == ""


def test_an_image_that_fits():
    assert fitting_input(Network(100).double()).shape == (2, 3, 224, 224)
    assert fitting_input(Network(10_000).double()) is None
    assert "runs on no image" in agreement(Network(10_000)).unproven
    before = copy.deepcopy(model := Network()).state_dict()
    fitting_input(model.double(), batch=3)
    assert all(torch.equal(value.double(), before[name].double()) for name, value in model.state_dict().items())


class Amplifying(nn.Module):
    """All but equal values behind a norm: every rounding error comes out a million times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.BatchNorm2d(4, eps=1e-30)

    def forward(self, x):
        return self.norm(self.network(x) * 1e-9 + 1.0)


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-3])
def test_rounding_that_stock_amplifies_is_no_difference(scale):
    def fuse(model):
        report = patch(model)
        model.norm.weight.data.mul_(scale)
        return report

    assert agreement(Amplifying(), fuse=fuse).ok == (scale == 1.0)
