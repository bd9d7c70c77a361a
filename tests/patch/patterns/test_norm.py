"""Norms whose convolution stays outside."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from fusedres.patch import explain, patch
from fusedres.testing import channels_last, compare

from ..blocks import Layers, check_patched, images, settled


class Reflected(Layers):
    """A residual block whose convolutions no block has."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect") for _ in range(2))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.ConvTranspose2d(4, 3, 2, 2)
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


def around(report):
    return [(site.path, site.pattern, site.norms) for site in report.fused]


def test_a_residual_block():
    report = check_patched(Reflected())
    assert around(report) == [("", "bn-relu", ("bn1",)), ("", "norm and residual (second input)", ("bn2",))]
    assert (report.covered, report.total, report.covered_norms) == (0, 2, 2)
    assert "reflect" in report.declined[0].reason


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.relu(self.branch(x).add_(x)),
        lambda self, x: F.relu(x + self.branch(x), inplace=True),
        lambda self, x: self.branch(x) + x,
        lambda self, x: F.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))),
    ],
)
def test_ways_to_write_it(forward):
    report = check_patched(type("Written", (Reflected,), {"forward": forward})())
    assert around(report)[-1][1] == "norm and residual (second input)"


def test_a_decoder():
    report = check_patched(Decoder())
    assert around(report) == [("net", "bn-leaky_relu(0.2)", ("net.1",))]
    assert report.notes == ()


@pytest.mark.parametrize("spoil", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_reparametrized_convolutions(spoil):
    model = Layers().double()
    spoil(model.conv1), spoil(model.conv2)
    stock, x = model.eval(), images()
    patched = copy.deepcopy(stock)
    assert [pattern for _, pattern, _ in around(patch(patched))] == ["bn-relu", "norm and residual (second input)"]
    torch.testing.assert_close(patched(x), stock(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.bn1(x),
        lambda self, x: torch.tanh(self.bn1(x)),
        lambda self, x: (lambda y: F.relu(y) + y.mean())(self.bn1(x)),
        lambda self, x: F.relu(self.bn1(self.bn1(x))),
    ],
    ids=["nothing behind it", "another function", "read twice", "called twice"],
)
def test_what_gains_nothing_or_may_not(forward):
    assert check_patched(type("Odd", (Layers,), {"forward": forward})()).fused == ()


def test_a_hook_added_later_runs():
    model = settled(Reflected()).eval()
    stock, x = copy.deepcopy(model), images()
    patch(model)
    for m in (model, stock):
        m.bn1.register_forward_hook(lambda *args: 2 * args[2])
    torch.testing.assert_close(model(x), stock(x), rtol=1e-9, atol=1e-11)


def test_a_convolution_is_still_preferred():
    report = explain(Layers())
    assert [site.pattern for site in report.fused] == ["post-activation residual (identity)"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [Reflected, Decoder])
def test_within_the_budgets(make, autocast, training):
    model = make().train(training)
    compare(model, patch, lambda seed: [channels_last((16, 4, 32, 32), seed=seed)], autocast=autocast).check()
