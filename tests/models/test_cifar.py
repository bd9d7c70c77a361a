"""The CIFAR networks, residual and plain: depth, the parameter-free shortcut, agreement of stock and fused."""

from __future__ import annotations

import pytest
import torch
from network_agreement import assert_agrees
from torch import nn

from fusedres import models
from fusedres.models.cifar import CifarBlock, PaddedShortcut

# Parameters in millions, from He et al. (2016), table 6.
PAPER = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


@pytest.mark.parametrize("network", [models.cifar_resnet, models.plain])
@pytest.mark.parametrize("depth", PAPER)
def test_depth_and_size_are_the_papers(network, depth):
    with torch.device("meta"):
        model = network(depth, fused=False)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert layers == depth
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(PAPER[depth], rel=0.03)


@pytest.mark.parametrize("network", [models.cifar_resnet, models.plain])
@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_other_depths_are_refused(network, depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        network(depth)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels():
    x = torch.randn(2, 4, 6, 6)
    out = PaddedShortcut(4)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("network", [models.cifar_resnet, models.plain])
def test_fused_agrees_with_stock(network, training):
    assert_agrees(network(8, fused=False), lambda: network(8, fused=False), fused=True, training=training, size=16)


def test_a_plain_network_is_a_cifar_resnet_without_its_shortcuts():
    residual, plain = models.cifar_resnet(8, fused=False).eval(), models.plain(8, fused=False).eval()
    plain.load_state_dict(residual.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(residual(x), plain(x))
    for block in residual.modules():
        if isinstance(block, CifarBlock):
            block.shortcut = Nothing()
    assert torch.equal(residual(x), plain(x))


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros(())


def test_plain_blocks_have_no_shortcut_to_start_as():
    model = models.plain(8, fused=False)
    models.init_weights(model, zero_last_gamma=True)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_blocks_that_start_as_their_shortcuts():
    block = models.cifar_resnet(14, fused=False, zero_init_residual=True).layer1[1]
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), torch.relu(x))
