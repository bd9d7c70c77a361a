"""The ImageNet networks have torchvision's and timm's weights and numbers, stock and fused."""

from __future__ import annotations

import pytest
import torch
from network_agreement import assert_agrees
from torchvision_shim import timm_models, torchvision_models

from fusedres import models
from fusedres.models.resnet import BasicBlock, Bottleneck, ResNet
from fusedres.patch import patch

SMALL = ("resnet18", "resnet50", "resnext50_32x4d")


def on_meta(name, **options):
    with torch.device("meta"):
        return getattr(models, name)(**options)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_the_same_seed_gives_torchvisions_weights_and_outputs(name, zero_init_residual):
    theirs_of, ours_of = getattr(torchvision_models(), name), getattr(models, name)
    torch.manual_seed(0)
    theirs = theirs_of(zero_init_residual=zero_init_residual).eval()
    torch.manual_seed(0)
    ours = ours_of(zero_init_residual=zero_init_residual, fused=False).eval()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


LAYERS = (1, 2, 1, 1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
def test_torchvisions_numbers(kind, training, fused):
    resnet = torchvision_models().resnet
    theirs_block, block = (resnet.BasicBlock, BasicBlock) if kind == "basic" else (resnet.Bottleneck, Bottleneck)
    groups, width = (8, 4) if kind == "grouped" else (1, 64)
    theirs = resnet.ResNet(theirs_block, LAYERS, num_classes=7, groups=groups, width_per_group=width)
    ours = lambda: ResNet(block, LAYERS, num_classes=7, groups=groups, base_width=width)  # noqa: E731
    assert_agrees(theirs, ours, fused=fused, training=training)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_timms_numbers_with_squeeze_and_excitation(training, fused):
    resnet = timm_models().resnet
    options = {"block_args": {"attn_layer": "se"}, "zero_init_last": False}
    theirs = resnet.ResNet(resnet.Bottleneck, LAYERS, num_classes=7, **options)
    ours = lambda: ResNet(Bottleneck, LAYERS, num_classes=7, reduction=16)  # noqa: E731
    assert_agrees(theirs, ours, fused=fused, training=training)


@pytest.mark.parametrize("name", ["resnet18", "seresnet50"])
def test_options(name):
    model = getattr(models, name)(num_classes=5, in_channels=1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_patch_after_the_fact_is_the_same_as_fused():
    model = on_meta("resnet18", fused=False)
    assert patch(model).coverage == 1.0
    assert type(model.layer1[0]) is type(on_meta("resnet18").layer1[0])


def test_a_basic_block_takes_no_groups():
    with pytest.raises(ValueError, match="groups=1, base_width=64 and reduction=0, got 2, 64 and 0"):
        models.resnet18(groups=2)
