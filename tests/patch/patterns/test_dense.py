"""Dense blocks as they are written, and the ones that are none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_shim import torchvision_models

from ..blocks import check_patched, images
from ..chance import check_seeded


def layer(channels: int, growth: int = 2, dropout: float = 0.0) -> nn.Sequential:
    steps = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth, 3, padding=1)]
    return nn.Sequential(*steps, *([nn.Dropout(dropout)] if dropout else []))


class Dense(nn.Module):
    """Three layers, for forwards that a test writes into a subclass."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(c, **options) for c in (4, 6, 8))


def dense(forward, **options) -> nn.Module:
    return type("Block", (Dense,), {"forward": forward})(**options)


def collecting(self, x):
    features = [x]
    for layer in self.layers:
        features.append(layer(torch.cat(features, dim=1)))
    return torch.cat(features, dim=1)


def growing(self, x):
    for layer in self.layers:
        x = torch.cat([x, layer(x)], 1)
    return x


def growing_with_names(self, x):
    for layer in self.layers:
        x = torch.concat(tensors=(x, layer(x)), dim=-3)
    return x


def first_layer_alone(self, x):
    one = self.layers[0](x)
    two = self.layers[1](torch.cat([x, one], 1))
    return torch.cat([x, one, two, self.layers[2](torch.cat([x, one, two], 1))], 1)


@pytest.mark.parametrize("forward", [collecting, growing, growing_with_names, first_layer_alone])
def test_forms(forward):
    report = check_patched(dense(forward))
    assert [site.pattern for site in report.fused] == ["dense block of 3"]
    assert report.coverage == 1.0
    assert "return fusedres_block.run_dense(dense_0, self, x)" in report.source("")
    assert "#     [...] -> layers.1.0 -> relu -> layers.1.2" in report.source("")


def test_what_follows_a_concatenation():
    """The input is itself a concatenation, and the result goes into another."""

    def forward(self, x):
        out = collecting(self, torch.cat([x[:, :2], x[:, 2:]], 1))
        return torch.cat([out, x], 1)

    report = check_patched(dense(forward))
    assert [site.pattern for site in report.fused] == ["dense block of 3"]
    assert report.source("").count("torch.cat") == 2


def test_two_in_a_row():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = dense(collecting), dense(collecting)
            self.between = nn.Conv2d(10, 4, 1)

        def forward(self, x):
            return self.b(self.between(self.a(x)))

    report = check_patched(Two())
    assert {site.path: site.pattern for site in report.fused} == {"a": "dense block of 3", "b": "dense block of 3"}


def new_channels_first(self, x):
    for layer in self.layers:
        x = torch.cat([layer(x), x], 1)
    return x


def along_the_rows(self, x):
    one = self.layers[0](x)
    return torch.cat([x[:, :2], one], 2)


def shows_a_value(self, x):
    one = self.layers[0](x)
    x = torch.cat([x, one], 1)
    return torch.cat([x, self.layers[1](x)], 1), one


def branches_of_inception(self, x):
    return torch.cat([self.layers[0](x), self.layers[0][1](x)], 1)


@pytest.mark.parametrize("forward", [new_channels_first, along_the_rows, shows_a_value, branches_of_inception])
def test_what_is_no_dense_block_is_fused_in_its_layers(forward):
    model = dense(forward)
    if forward is new_channels_first:
        model.layers = nn.ModuleList(layer(c) for c in (4, 6, 8))
    report = check_patched(model)
    assert {site.pattern for site in report.fused} == {"bn-relu-conv"}


def test_dropout_ends_a_layer():
    report = check_seeded(dense(collecting, dropout=0.3))
    assert [site.pattern for site in report.fused] == ["dense block of 3 (dropout)"]


def test_a_layer_that_no_dense_block_has():
    def activated(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return x

    report = check_patched(dense(activated))
    assert {site.pattern for site in report.fused} == {"bn-relu-conv-relu"}


def test_torchvision():
    model = torchvision_models().DenseNet(4, (3, 2), 8, 2, num_classes=3)
    report = check_patched(model, images(3, 40))
    assert report.coverage == 1.0
    assert {site.path: site.pattern for site in report.fused} == {
        "features": "conv-bn-relu-maxpool",
        "features.denseblock1": "dense block of 3",
        "features.transition1": "bn-relu-conv",
        "features.denseblock2": "dense block of 2",
    }


def test_torchvision_with_checkpoints_is_left_with_the_reason():
    model = torchvision_models().DenseNet(4, (2, 2), 8, 2, num_classes=3, memory_efficient=True)
    report = check_patched(model, images(3, 40))
    reasons = {d.path: d.reason for d in report.declined}
    assert "branches on data" in reasons["features.denseblock1.denselayer1.conv1"]
