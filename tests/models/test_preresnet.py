"""The pre-activation networks: timm's numbers, the paper's depths and sizes."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from network_agreement import assert_agrees
from torch import nn
from torchvision_shim import timm_models

from fusedres import models
from fusedres.models.preresnet import PreActBasic, PreActBottleneck, PreResNet

LAYERS, CHANNELS = (1, 2, 1), (32, 64, 64)
OPTIONS = {"stem_channels": 16, "num_classes": 7}


def timms(block, **options):
    timm = timm_models()
    basic = {"basic": True, "bottle_ratio": 1.0} if block is PreActBasic else {}
    layers = {"conv_layer": timm.resnetv2.create_conv2d, "norm_layer": timm.resnetv2.BatchNormAct2d}
    return timm.ResNetV2(LAYERS, CHANNELS, num_classes=7, stem_chs=16, **layers, **basic, **options)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", [PreActBasic, PreActBottleneck])
def test_timms_numbers(block, training, fused):
    assert_agrees(timms(block), lambda: PreResNet(block, LAYERS, CHANNELS, **OPTIONS), fused=fused, training=training)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_timms_numbers_for_small_images(training, fused):
    theirs = timms(PreActBottleneck)
    theirs.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 16, 3, padding=1, bias=False)))
    ours = lambda: PreResNet(PreActBottleneck, LAYERS, CHANNELS, small_images=True, **OPTIONS)  # noqa: E731
    assert_agrees(theirs, ours, fused=fused, training=training, size=16)


# Parameters in millions, from He et al. (2016, "Identity Mappings in Deep Residual Networks"), table 4.
@pytest.mark.parametrize("depth, millions", [(164, 1.7), (1001, 10.2)])
def test_depth_and_size_are_the_papers(depth, millions):
    with torch.device("meta"):
        model = models.cifar_preresnet(depth, fused=False)
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
    assert len(convolutions) == depth
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("depth", [0, 2, 12, 111])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=rf"9n \+ 2.*got {depth}"):
        models.cifar_preresnet(depth)


def test_blocks_that_start_as_their_shortcuts():
    model = models.cifar_preresnet(20, fused=False, zero_init_residual=True)
    block = model.stages[0].blocks[1]
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(x), x)


def test_options():
    assert models.cifar_preresnet(11, in_channels=1, num_classes=5)(torch.randn(2, 1, 8, 8)).shape == (2, 5)
