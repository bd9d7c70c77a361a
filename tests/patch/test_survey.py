"""Every block of the survey as a user writes it: found whole, and the same numbers."""

from __future__ import annotations

import pytest
import survey_blocks as survey
import torch
from torch import nn

import fusedres
from fusedres.testing import channels_last, compare

from .blocks import images
from .chance import check_seeded

IDENTITY, PROJECTION = "post-activation residual (identity)", "post-activation residual (projection)"
PRE, PRE_PROJECTION = "pre-activation residual (identity)", "pre-activation residual (projection)"
PENDING = "pre-activation residual (projection of the activated input)"


def resnet() -> nn.Module:
    return survey.ResNet(5, (8, 16, 16, 16, 16), (2, 1, 1, 1))


NETWORKS = {
    "MyResNet": (
        lambda: survey.MyResNet(3, 4, 2),
        {"stem": "conv-bn-relu", "layers.0": IDENTITY, "layers.1": IDENTITY},
    ),
    "ResNet": (
        resnet,
        {
            "stem": "conv-bn-relu-maxpool",
            "layer1.0": PROJECTION,
            "layer1.1": IDENTITY,
            **{f"layer{i}.0": PROJECTION for i in (2, 3, 4)},
        },
    ),
}

BLOCKS = {
    "residual": (lambda: survey.ResidualBlock(4), IDENTITY),
    "residual, projection": (lambda: survey.ResidualBlock(4, 8, 2), PROJECTION),
    "bottleneck": (lambda: survey.BottleneckBlock(4, 4), IDENTITY),
    "bottleneck, projection": (lambda: survey.BottleneckBlock(4, 8, 2), PROJECTION),
    "ResNeXt bottleneck": (lambda: survey.ResNeXtBottleneckBlock(4, 4, 1, 2, 2), IDENTITY),
    "ResNeXt bottleneck, projection": (lambda: survey.ResNeXtBottleneckBlock(4, 8, 2, 2, 2), PROJECTION),
    "pre-activation": (lambda: survey.PreActResidualBlock(4), PRE),
    "pre-activation, projection": (lambda: survey.PreActResidualBlock(4, 8, 2), PRE_PROJECTION),
    "pre-activation, shared": (lambda: survey.PendingPreActResidualBlock(4, 8, 2), PENDING),
    "pre-activation, shared, identity": (lambda: survey.PendingPreActResidualBlock(4), PRE),
    "pre-activation bottleneck": (lambda: survey.PreActBottleneckBlock(4, 4), PRE),
    "pre-activation bottleneck, projection": (lambda: survey.PreActBottleneckBlock(4, 8, 2), PRE_PROJECTION),
    "pre-activation bottleneck, shared": (lambda: survey.PendingPreActBottleneckBlock(4, 8, 2), PENDING),
    "wide": (lambda: survey.WideResidualBlock(4, 4), PRE),
    "wide, projection": (lambda: survey.WideResidualBlock(4, 8, 2), PRE_PROJECTION),
    "wide, dropout": (
        lambda: survey.WideResidualBlock(4, 8, 2, dropout=0.3),
        "pre-activation residual (projection, dropout)",
    ),
    "ResNeXt": (lambda: survey.ResNeXtBlock(4, 4, 1, 2, 2), PRE),
    "ResNeXt, projection": (lambda: survey.ResNeXtBlock(4, 8, 2, 2, 2), PRE_PROJECTION),
    "squeeze-excitation": (lambda: survey.SEBlock(4, 2), "squeeze-excitation"),
    "squeeze-excitation bottleneck": (
        lambda: survey.SEBottleneckBlock(4, 4, 1, 2),
        "post-activation residual (identity, squeeze-excitation)",
    ),
    "squeeze-excitation bottleneck, projection": (
        lambda: survey.SEBottleneckBlock(4, 8, 2, 2),
        "post-activation residual (projection, squeeze-excitation)",
    ),
    "dense": (lambda: survey.DenseBlock(3, 4, 2), "dense block of 3"),
    "dense bottleneck": (lambda: survey.DenseBottleneckBlock(3, 4, 2), "dense block of 3"),
    "dense bottleneck, dropout": (
        lambda: survey.DenseBottleneckBlock(3, 4, 2, dropout=0.3),
        "dense block of 3 (dropout)",
    ),
    "dense layer": (lambda: survey.DenseBottleneckLayer(4, 2, dropout=0.3), "bn-relu-conv-bn-relu-conv-dropout"),
    "transition": (lambda: survey.Transition(4, 2), "bn-relu-conv"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    make, pattern = BLOCKS[name]
    report = check_seeded(make(), images(4, 8))
    assert [site.pattern for site in report.fused] == [pattern]
    assert report.coverage == 1.0
    assert report.declined == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    make, patterns = NETWORKS[name]
    report = check_seeded(make(), images(3, 40))
    assert {site.path: site.pattern for site in report.fused} == patterns
    assert report.coverage == 1.0


def test_every_block_is_in_the_table():
    made = {type(make()).__name__ for make, _ in (*BLOCKS.values(), *NETWORKS.values())}
    assert made == set(survey.__all__)


class OdeFunction(nn.Module):
    """The right-hand side as a user of torchdiffeq writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, t, x):
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class OdeBlock(nn.Module):
    def __init__(self, odefunc: nn.Module) -> None:
        super().__init__()
        self.odefunc = odefunc

    def forward(self, x):
        torchdiffeq = pytest.importorskip("torchdiffeq")
        return torchdiffeq.odeint(self.odefunc, x, torch.tensor([0.0, 1.0]), method="rk4")[-1]


def test_the_function_of_a_differential_equation_is_fused_inside_its_solver():
    model = OdeBlock(OdeFunction(8)).train()
    report = fusedres.explain(model)
    assert report.coverage == 1.0 and [site.path for site in report.fused] == ["odefunc"]
    compare(model, fusedres.patch, lambda seed: [channels_last((3, 8, 14, 14), seed=seed)]).check()
