"""How networks are initialised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedres import nn as blocks
from fusedres.nn import BottleneckBlock, ResidualBlock, init_weights
from fusedres.testing import channels_last


@pytest.mark.parametrize("mode", ["fan_out", "fan_in"])
def test_what_it_does(mode):
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), ResidualBlock(24), BottleneckBlock(24, 48, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    init_weights(model, mode=mode)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            channels = m.out_channels if mode == "fan_out" else m.in_channels
            fan = channels * m.kernel_size[0] * m.kernel_size[1]
            assert float(m.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.2)
            assert not m.bias.any()
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()


# Each block, the norm whose gamma is zeroed, and what is done to the shortcut's value.
ZEROED = {
    "ResidualBlock": (ResidualBlock, "bn2", torch.relu),
    "BottleneckBlock": (BottleneckBlock, "bn3", torch.relu),
    "ResNeXtBottleneckBlock": (lambda c, k: blocks.ResNeXtBottleneckBlock(c, k, 1, 4, 4), "bn3", torch.relu),
    "SEBottleneckBlock": (lambda c, k: blocks.SEBottleneckBlock(c, k, 1, 4), "bn3", torch.relu),
    "PreActResidualBlock": (blocks.PreActResidualBlock, "bn2", torch.clone),
    "PreActBottleneckBlock": (blocks.PreActBottleneckBlock, "bn3", torch.clone),
    "WideResidualBlock": (blocks.WideResidualBlock, "bn2", torch.clone),
    "ResNeXtBlock": (lambda c, k: blocks.ResNeXtBlock(c, k, 1, 4, 4), "bn2", torch.clone),
}


@pytest.mark.parametrize("name", ZEROED)
def test_zeroing_the_last_gamma_makes_blocks_their_shortcuts(name):
    make, zeroed, after = ZEROED[name]
    block, projection = make(24, 24), make(24, 48)
    model = nn.Sequential(nn.BatchNorm2d(24), block, projection)
    init_weights(model, zero_last_gamma=True)
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            expected = 0 if name in (f"1.{zeroed}", f"2.{zeroed}") else 1
            assert (norm.weight == expected).all(), name
    x = channels_last((2, 24, 5, 5))
    torch.testing.assert_close(block(x), after(x))
    shortcut = projection.shortcut if hasattr(projection, "shortcut") else projection.downsample
    torch.testing.assert_close(projection(x), after(shortcut(x)))


def test_dense_layers_have_no_shortcut_and_keep_their_gammas():
    model = nn.Sequential(blocks.DenseBlock(2, 8, 4), blocks.DenseBottleneckBlock(2, 16, 4), blocks.Transition(24))
    init_weights(model, zero_last_gamma=True)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_norms_without_parameters_are_left_alone():
    init_weights(nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Linear(2, 2)), zero_last_gamma=True)
