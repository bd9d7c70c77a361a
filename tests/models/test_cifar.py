"""The CIFAR networks: depth, keys, the parameter-free shortcut, agreement of stock and fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusedres import models
from fusedres.models.cifar import PaddedShortcut
from fusedres.patch import explain

# Parameters in millions, from He et al. (2016), table 6.
PAPER = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


@pytest.mark.parametrize("depth", PAPER)
def test_depth_and_size_are_the_papers(depth):
    with torch.device("meta"):
        model = models.cifar_resnet(depth, fused=False)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert layers == depth
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(PAPER[depth], rel=0.03)


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        models.cifar_resnet(depth)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels():
    x = torch.randn(2, 4, 6, 6)
    out = PaddedShortcut(4)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


def test_every_convolution_is_fused():
    report = explain(models.cifar_resnet(20))
    assert report.coverage == 1.0, report


def test_keys_do_not_depend_on_fusing():
    assert list(models.cifar_resnet().state_dict()) == list(models.cifar_resnet(fused=False).state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_fused_agrees_with_stock(training):
    torch.manual_seed(0)
    stock = models.cifar_resnet(fused=False).train(training)
    fused = models.cifar_resnet().train(training)
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        stock_error, fused_error = ((model(x).double() - exact).norm() for model in (stock, fused))
    assert fused_error <= 2 * stock_error + 1e-6 * exact.norm()
