"""Whole networks: torchvision's, and the survey's as written there."""

from __future__ import annotations

import pytest
import torch
from survey_blocks import MyResNet
from torch import nn
from torchvision_shim import torchvision_models

from fusedres.patch import patch, unpatch

from .blocks import check_patched, images, settled

IDENTITY, PROJECTION = "post-activation residual (identity)", "post-activation residual (projection)"

STAGES = {
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnext50_32x4d": (3, 4, 6, 3),
    "wide_resnet50_2": (3, 4, 6, 3),
}


@pytest.mark.parametrize("name", STAGES)
def test_torchvision_is_covered_whole(name):
    model = getattr(torchvision_models(), name)()
    report = patch(model)
    assert report.coverage == 1.0
    assert report.declined == ()
    projected = {f"layer{i}.0" for i in (1, 2, 3, 4)} - ({"layer1.0"} if name == "resnet18" else set())
    blocks = [f"layer{i}.{j}" for i, n in enumerate(STAGES[name], 1) for j in range(n)]
    expected = {"": "conv-bn-relu", **{path: PROJECTION if path in projected else IDENTITY for path in blocks}}
    assert {site.path: site.pattern for site in report.fused} == expected
    assert "layer2.0.downsample.0" in {c for site in report.fused for c in site.convolutions}
    assert unpatch(model) == len(expected)


def small_resnet(block: str, **options) -> nn.Module:
    """torchvision's ResNet with one or two blocks a stage."""
    resnet = torchvision_models().resnet
    return resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], num_classes=7, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"block": "BasicBlock"},
        {"block": "Bottleneck", "groups": 32, "width_per_group": 4},
        {"block": "Bottleneck", "replace_stride_with_dilation": [False, False, True]},
    ],
)
def test_torchvision_gives_the_same_numbers(options):
    assert check_patched(small_resnet(**options), images(3, 40)).coverage == 1.0


def test_a_checkpoint_fits_both_ways():
    stock, patched = settled(small_resnet("BasicBlock")).eval(), small_resnet("BasicBlock").double().eval()
    patch(patched)
    assert list(patched.state_dict()) == list(stock.state_dict())
    patched.load_state_dict(stock.state_dict())
    x = images(3, 32)
    torch.testing.assert_close(patched(x), stock(x), rtol=1e-9, atol=1e-11)


def test_report_names_the_layout():
    model = MyResNet(3, 4, 1)
    assert any("channels_last" in note for note in patch(model).notes)
    assert patch(model.to(memory_format=torch.channels_last)).notes == ()
