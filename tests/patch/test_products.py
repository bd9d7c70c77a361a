"""Activations that people write out, as products of what they are made of."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_shim import timm_models

from fusedres.patch import patch
from fusedres.patch.products import written_activation

from .blocks import Layers, check_patched, images, settled


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class SwishInPlace(nn.Module):
    def forward(self, x):
        return x.mul_(x.sigmoid())


class SwishOfModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(x) * x


class HardSwish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3.0, inplace=True) / 6.0


class HardSwishOfModules(nn.Module):
    """As MobileNetV3 is often written."""

    def __init__(self):
        super().__init__()
        self.sigmoid = HardSigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


class HardSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


class Block(Layers):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


@pytest.mark.parametrize("act", [Swish, SwishOfModule])
def test_one_site(act):
    report = check_patched(Block(act()))
    assert len(report.fused) == 1
    assert report.source("").count("silu") == 2


@pytest.mark.parametrize("act", [HardSwish, HardSwishOfModules])
def test_hardswish(act):
    report = check_patched(Block(act()))
    assert len(report.fused) == 1
    assert report.source("").count("hardswish") == 2


def test_in_place():
    """Stock PyTorch itself refuses to differentiate this."""
    model = settled(Block(SwishInPlace())).eval()
    with torch.no_grad():
        expected = model(images())
        assert patch(model).source("").count("silu") == 2
        torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-11)


def test_inside_a_norm_of_timm():
    timm_models()
    norm_act = import_module("timm.layers.norm_act").BatchNormAct2d

    class Normed(Layers):
        def __init__(self):
            super().__init__()
            self.bn1 = norm_act(4, act_layer=Swish, inplace=False)

    report = check_patched(Normed())
    assert report.coverage == 1.0
    assert "bn1 -> silu" in report.source("")


class Gate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x + 1)


class OfAnother(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(-x)


class Kept(nn.Module):
    def forward(self, x):
        gate = torch.sigmoid(x)
        return x * gate + gate


class Sixth(nn.Module):
    def forward(self, x):
        return x * (x / 6)


class ShiftedByTwo(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 2) / 6


class OfOneShifted(nn.Module):
    def forward(self, x):
        return (x + 3) * F.relu6(x + 3) / 6


class KeptProduct(nn.Module):
    def forward(self, x):
        product = x * F.relu6(x + 3)
        return product / 6 + product


class FloorOfSixth(nn.Module):
    def forward(self, x):
        return torch.div(x * F.relu6(x + 3), 6, rounding_mode="floor")


@pytest.mark.parametrize("act", [Gate, OfAnother, Kept, Sixth, ShiftedByTwo, OfOneShifted, KeptProduct, FloorOfSixth])
def test_what_only_looks_like_it(act):
    report = check_patched(Block(act()))
    assert "silu" not in report.source("")
    assert "hardswish" not in report.source("")


def test_hooks_inside():
    act = HardSwishOfModules()
    act.sigmoid.relu.register_forward_hook(lambda *args: 2 * args[2])
    assert "hardswish" not in check_patched(Block(act)).source("")


class LeakyByFunction(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, 0.2)


@pytest.mark.parametrize(
    ("module", "name"),
    [(Swish(), "silu"), (SwishInPlace(), "silu"), (HardSwish(), "hardswish"), (LeakyByFunction(), "leaky_relu")],
)
def test_written_activations(module, name):
    assert written_activation(module).name == name


@pytest.mark.parametrize(
    "module", [Gate(), Kept(), Sixth(), ShiftedByTwo(), nn.Linear(2, 2), nn.Sequential(nn.ReLU()), nn.Identity()]
)
def test_what_is_no_activation(module):
    assert written_activation(module) is None
