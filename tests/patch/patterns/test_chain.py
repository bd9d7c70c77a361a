"""Convolutions with what follows them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.patch import explain

from ..blocks import check_patched, images
from .test_residual import block


@pytest.mark.parametrize(
    ("forward", "pattern"),
    [
        (lambda self, x: self.bn1(self.conv1(x)), "conv-bn"),
        (lambda self, x: self.relu(self.bn1(self.conv1(x))), "conv-bn-relu"),
        (lambda self, x: F.relu6(self.conv1(x)), "conv-relu6"),
        (lambda self, x: F.leaky_relu(self.conv1(x), negative_slope=0.2), "conv-leaky_relu(0.2)"),
        (lambda self, x: self.conv2(self.conv1(x)), "conv x 2"),
        (lambda self, x: F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))), "conv-bn-relu x 2"),
        (lambda self, x: self.conv2(F.relu(self.conv1(x))), "conv-relu-conv"),
    ],
)
def test_names(forward, pattern):
    report = check_patched(block(forward))
    assert [site.pattern for site in report.fused] == [pattern]


def test_the_longest_beginning_that_the_engine_runs():
    report = check_patched(block(lambda self, x: self.bn1(F.relu(self.conv1(x)))))
    assert [site.pattern for site in report.fused] == ["conv-relu"]
    assert "self.bn1(" in report.source("")


def test_a_lone_convolution_is_left_alone():
    report = explain(block(lambda self, x: torch.sigmoid(self.conv1(x))))
    reasons = {d.path: d.reason for d in report.declined}
    assert report.fused == ()
    assert "stands alone" in reasons["conv1"]
    assert "does not call it" in reasons["conv2"]


def test_stays_within_one_module():
    unit = lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())  # noqa: E731
    report = check_patched(nn.Sequential(unit(), unit()), images())
    assert {site.path: site.pattern for site in report.fused} == {"0": "conv-bn-relu", "1": "conv-bn-relu"}


def test_reaches_into_a_wrapped_pair():
    model = block(lambda self, x: F.relu(self.pair(x)), pair=nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    report = check_patched(model)
    assert [(site.path, site.pattern, site.convolutions) for site in report.fused] == [
        ("", "conv-bn-relu", ("pair.0",))
    ]


def test_what_the_model_does_around_it_stays():
    def forward(self, x):
        gate = torch.sigmoid(self.conv2(x.mean((2, 3), keepdim=True)))
        return gate * F.relu(self.bn1(self.conv1(x)))

    report = check_patched(block(forward))
    assert [site.convolutions for site in report.fused] == [("conv1",)]
