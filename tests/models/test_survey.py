"""The survey's networks are what its code is."""

from __future__ import annotations

import pytest
import survey_blocks
import torch
from network_agreement import assert_agrees
from torch import nn

from fusedres.models import MyResNet, SurveyResNet, init_weights

CHANNELS, BLOCKS = (8, 16, 16, 32, 32), (1, 2, 1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_my_resnet(training):
    theirs = survey_blocks.MyResNet(3, 12, 2)
    assert_agrees(theirs, lambda: MyResNet(3, 12, 2), fused=False, training=training, size=12)


@pytest.mark.parametrize("training", [True, False])
def test_resnet(training):
    theirs = survey_blocks.ResNet(7, CHANNELS, BLOCKS)
    ours = lambda: SurveyResNet(7, channels=CHANNELS, blocks=BLOCKS)  # noqa: E731
    assert_agrees(theirs, ours, fused=False, training=training, size=96)


def test_resnet_as_written():
    with torch.device("meta"):
        ours, theirs = SurveyResNet(), survey_blocks.ResNet()
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_every_stage_halves_the_image():
    model = SurveyResNet(7, channels=CHANNELS, blocks=BLOCKS)
    x = model.stem(torch.randn(2, 3, 224, 224))
    for stage, size in zip((model.layer1, model.layer2, model.layer3, model.layer4), (28, 14, 7, 4)):
        x = stage(x)
        assert x.shape[2:] == (size, size)


def test_zero_gammas():
    model = SurveyResNet(7, channels=CHANNELS, blocks=BLOCKS)
    init_weights(model, zero_last_gamma=True)
    zero = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()}
    assert zero == {"layer1.0.bn3", "layer2.0.bn3", "layer2.1.bn3", "layer3.0.bn3", "layer4.0.bn3"}
