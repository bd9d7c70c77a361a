"""The blocks with grouped convolutions."""

from __future__ import annotations

import pytest
import survey_blocks
import torch
from nn_contract import SHAPES, ResidualContract
from torchvision_shim import torchvision_models

from fusedres.nn import ResNeXtBlock, ResNeXtBottleneckBlock
from fusedres.testing import channels_last, compare

GROUPED = {name: {**arguments, "cardinality": 4, "width": 6} for name, arguments in SHAPES.items()}


class TestResNeXtBlock(ResidualContract):
    plain, fused, last, shapes = survey_blocks.ResNeXtBlock, ResNeXtBlock, "conv3", GROUPED


class TestResNeXtBottleneckBlock(ResidualContract):
    plain, fused, last, shapes = survey_blocks.ResNeXtBottleneckBlock, ResNeXtBottleneckBlock, "bn3", GROUPED


@pytest.mark.parametrize("block", [ResNeXtBlock, ResNeXtBottleneckBlock])
def test_defaults(block):
    conv = block(16, 64).conv2
    assert (conv.groups, conv.out_channels) == (32, 128)


def test_a_stage_of_torchvisions():
    theirs = torchvision_models().resnext50_32x4d().layer2

    def fuse(stage):
        ours = [ResNeXtBottleneckBlock(256, 512, 2, 32, 8, bias=False)]
        ours += [ResNeXtBottleneckBlock(512, 512, 1, 32, 8, bias=False) for _ in range(1, len(stage))]
        stage_of_ours = torch.nn.Sequential(*ours)
        stage_of_ours.load_state_dict(stage.state_dict())
        return stage_of_ours.to(next(stage.parameters()).dtype)

    compare(theirs, fuse, lambda seed: [channels_last((2, 256, 8, 8), seed=seed)]).check()
